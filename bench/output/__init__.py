"""What is written: whole files, one frame in three tables, pictures in one style. torch is never imported."""

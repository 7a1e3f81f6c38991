"""What is written: whole files, one frame in four tables, pictures in one style. torch is never imported."""

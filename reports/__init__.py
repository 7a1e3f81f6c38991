"""Tables and pictures, made from records alone; torch is never imported."""

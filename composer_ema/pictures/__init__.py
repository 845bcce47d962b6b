"""What runs did and what recipes will do, as pictures and tables."""

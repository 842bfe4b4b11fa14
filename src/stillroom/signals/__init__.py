"""What is kept of the teacher."""

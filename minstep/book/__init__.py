"""What the book is made of beside its text: figures, the museum of bugs, and the exercises."""

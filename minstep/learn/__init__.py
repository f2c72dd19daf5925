"""Learning by doing: exercises by chapter, and the museum of bugs."""

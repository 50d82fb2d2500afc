"""What both stages and the evaluation share and that knows no picture, class or network."""

"""Files and texts of other programs, read as they are meant or refused. Knows no data set."""

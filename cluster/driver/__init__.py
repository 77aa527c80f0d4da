"""The side of a run that the user's command is: workers started, watched, told to stop; the run folder filled."""

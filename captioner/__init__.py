"""What the scripts are made of: a room for each subject, each of which imports only those below it."""

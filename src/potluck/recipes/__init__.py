"""What comes with Potluck to be trained? One recipe a file, each readable as a lesson."""

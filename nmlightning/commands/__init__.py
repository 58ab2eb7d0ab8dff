"""What `nm` runs: options, run folders, reports and the training commands themselves."""

"""The commands of `nm`: their options, run folders and reports."""

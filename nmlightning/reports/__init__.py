"""Pictures, tables and pages of what a run left behind. Nothing here needs torch."""

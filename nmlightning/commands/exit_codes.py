"""What `nm` exits with when it did not do what it was asked."""

FAILED_CHECK = 1
BAD_INPUT = 2
LOST_PROCESS = 75  # EX_TEMPFAIL of sysexits.h: the same command may well succeed
INTERRUPTED = 130  # 128 + SIGINT, as shells report a program that Ctrl-C ended
TERMINATED = 143  # 128 + SIGTERM, which schedulers send before they take the machine away

"""The shipped experiments, one whole run per file; installed as `nmlightning.configs`."""

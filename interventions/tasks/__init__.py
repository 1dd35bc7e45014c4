"""The twenty binary next-token tasks over Python source (paper, Table 1), one file each."""

"""Looking at what was made, and handing it on."""

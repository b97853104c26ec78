"""Images from the web: of hosts that the caller allows, within limits, of public addresses only."""

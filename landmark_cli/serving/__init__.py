"""A server over HTTP: requests read and answered together, by one reader whose rows each go at their own pace."""

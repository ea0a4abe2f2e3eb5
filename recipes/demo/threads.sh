# How the demo's threads wait, for the scripts that take this in. A thread that has done its part of an operation sleeps
# until the others have too. By default it turns in a circle meanwhile: beside other programs the ones it waits for then get
# a third of the time.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

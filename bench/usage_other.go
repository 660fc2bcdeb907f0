//go:build !unix

// What the process has used so far, where nobody tells.

package main

import "time"

// cpuTime returns 0.
func cpuTime() time.Duration { return 0 }

//go:build !unix

// What the process has used so far, on systems that do not report it.

package main

import "time"

// cpuTime returns 0.
func cpuTime() time.Duration { return 0 }

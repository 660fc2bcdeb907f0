//go:build !unix

package test

// processorTime is not known here.
func processorTime() int64 { return 0 }

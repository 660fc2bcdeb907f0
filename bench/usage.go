// What a process costs: processor, allocations, memory.

package main

import (
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"
)

// usage is a reading of the counters of this process.
type usage struct {
	cpu     time.Duration // user and system
	mallocs uint64
	octets  uint64 // allocated
}

func used() usage {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return usage{cpu: cpuTime(), mallocs: m.Mallocs, octets: m.TotalAlloc}
}

// settle returns unused memory to the system, resets the peak, and returns the resident size.
func settle() int64 {
	debug.FreeOSMemory()
	os.WriteFile("/proc/self/clear_refs", []byte("5"), 0)
	return status("VmRSS")
}

// peak returns the largest resident size since settle.
func peak() int64 { return status("VmHWM") }

// status returns a line of Linux's /proc/self/status in octets, or 0 if there is none.
func status(name string) int64 {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == name+":" {
			kb, _ := strconv.ParseInt(f[1], 10, 64)
			return kb << 10
		}
	}
	return 0
}

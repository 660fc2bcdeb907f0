// Waiting for a point in time, more exactly than the runtime's timers do.

package main

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// alarm waits for one point in time at a time. The runtime sleeps in whole milliseconds when nothing else is runnable, which is a
// fifth of a round trip of 5 ms; a timerfd wakes the poller to within some tens of microseconds.
type alarm struct {
	file *os.File
	buf  [8]byte
}

func newAlarm() *alarm {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		panic(fmt.Sprintf("bench: timerfd: %v", err))
	}
	return &alarm{file: os.NewFile(uintptr(fd), "timerfd")}
}

// waitUntil returns at t, or at once if t has passed.
func (a *alarm) waitUntil(t time.Time) {
	d := time.Until(t)
	if d <= 0 {
		return
	}
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(d.Nanoseconds())}
	raw, err := a.file.SyscallConn() // not Fd, which would make the descriptor blocking
	if err != nil {
		return
	}
	if raw.Control(func(fd uintptr) { err = unix.TimerfdSettime(int(fd), 0, &spec, nil) }) != nil || err != nil {
		return // closed: the line is being torn down
	}
	a.file.Read(a.buf[:])
}

func (a *alarm) close() { a.file.Close() }

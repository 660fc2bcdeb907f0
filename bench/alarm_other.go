//go:build !linux

// Waiting for a point in time, as exactly as the runtime's timers do.

package main

import "time"

type alarm struct{}

func newAlarm() *alarm { return &alarm{} }

// waitUntil returns at t, or at once if t has passed.
func (a *alarm) waitUntil(t time.Time) { time.Sleep(time.Until(t)) }

func (a *alarm) close() {}

//go:build !linux

// Waiting for a moment, as exactly as the runtime's timers do.

package main

import "time"

type alarm struct{}

func newAlarm() *alarm { return &alarm{} }

// waitUntil returns when t is reached, at once if it is past.
func (a *alarm) waitUntil(t time.Time) { time.Sleep(time.Until(t)) }

func (a *alarm) close() {}

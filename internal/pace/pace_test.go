package pace

import (
	"testing"
	"time"
)

// The arithmetic of the pace, at times that a test chooses.

func near(t *testing.T, what string, got, want float64) {
	t.Helper()
	if got < want*0.99 || got > want*1.01 {
		t.Errorf("%s: a pace of %.3f, want %.3f", what, got, want)
	}
}

func TestPaceIsCutOnceForARoundAndRisesAfterwards(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	p := New(0)
	if !p.Ready(now) {
		t.Error("no pace, and not ready")
	}
	for i := range 20 {
		p.recent.add(now.Add(time.Duration(i) * 50 * time.Millisecond))
	}
	now = now.Add(time.Second)
	if !p.TooFast(0, now) || p.TooFast(0, now) {
		t.Error("a round cuts once")
	}
	near(t, "what the relay has accepted in the last second", p.rate, 20)
	now = now.Add(2 * time.Second)
	p.rise(now)
	near(t, "two seconds later", p.rate, 20)
	now = now.Add(time.Second)
	p.rise(now)
	near(t, "a second later, while it searches", p.rate, 25)
	p.TooFast(1, now)
	near(t, "cut again", p.rate, 22.5)
	now = now.Add(3 * time.Second)
	p.rise(now)
	near(t, "three seconds later", p.rate, 22.5*creep)
	for p.rate <= 25 {
		now = now.Add(time.Second)
		p.rise(now)
	}
	was := p.rate
	now = now.Add(time.Second)
	p.rise(now)
	near(t, "a second later, above the rate that was refused", p.rate, was*beyond)
	now = now.Add(memory)
	p.rise(now)
	if p.rate != 0 || !p.cutAt.IsZero() {
		t.Errorf("after ten minutes there is still a pace of %.2f", p.rate)
	}
}

func TestPaceNeverLeavesItsBounds(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	p := New(14)
	for round := range 200 {
		p.TooFast(round, now)
	}
	near(t, "cut for ever", p.rate, least)
	for range 3000 {
		now = now.Add(200 * time.Millisecond)
		p.rise(now)
	}
	near(t, "ten minutes later", p.rate, 14)
	off := New(-1)
	if off.TooFast(0, now) || !off.Ready(now) {
		t.Error("a pace that is off was cut")
	}
}

// Tickets are handed out one at a time: whoever is late does not let those behind him catch up.
func TestPaceMakesUpForNoPause(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	p := New(10)
	begun := 0
	for range 1000 { // a second, each millisecond of it
		if p.Ready(now) {
			p.Begin(now)
			begun++
		}
		now = now.Add(time.Millisecond)
	}
	if begun < 10 || begun > 11 {
		t.Errorf("%d in the first second", begun)
	}
	now = now.Add(time.Hour)
	begun = 0
	for p.Ready(now) {
		p.Begin(now)
		begun++
	}
	if begun > 1 {
		t.Errorf("%d at once after a pause", begun)
	}
}

package pace

import (
	"math"
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
	for i := range 16 {
		p.Accepted(0, now.Add(time.Duration(i)*50*time.Millisecond))
	}
	now = now.Add(time.Second)
	if !p.TooFast(0, now) || p.TooFast(0, now) {
		t.Error("a round cuts once")
	}
	near(t, "what the relay has accepted in the last second", p.Rate(now), 16)
	for range 4 {
		p.Accepted(0, now)
	}
	near(t, "with what was under way", p.Rate(now), 20)
	now = now.Add(time.Second / 2)
	p.TooFast(1, now)
	near(t, "cut by a tenth", p.Rate(now), 18)
	slow := time.Duration(regain * math.Sqrt(18) * float64(time.Second))
	now = now.Add(slow)
	near(t, "as before the cut", p.Rate(now), 18*1.1)
	near(t, "a little later", p.Rate(now.Add(time.Second)), 18*1.1*1.0194)
	near(t, "later", p.Rate(now.Add(double*time.Second)), 2*18*1.1)
	if rate := p.Rate(now.Add(memory)); rate != 0 {
		t.Errorf("after ten minutes there is still a pace of %.2f", rate)
	}
}

func TestPaceIsNotCutBelowWhatTheRelayAccepts(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	p := New(20)
	for range 20 {
		p.Accepted(0, now)
	}
	for round := range 10 {
		p.TooFast(round, now.Add(time.Second/2))
	}
	near(t, "refused for the rest of a second", p.Rate(now.Add(time.Second/2)), 18)
	p.TooFast(10, now.Add(10*time.Second))
	near(t, "refused for longer", p.Rate(now.Add(10*time.Second)), 1)
}

func TestPaceNeverLeavesItsBounds(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	p := New(14)
	for round := range 200 {
		p.TooFast(round, now)
	}
	near(t, "cut for ever", p.Rate(now), least)
	for range 3000 {
		now = now.Add(200 * time.Millisecond)
		if rate := p.Rate(now); rate > 14 {
			t.Fatalf("a pace of %.2f", rate)
		}
	}
	near(t, "ten minutes later", p.Rate(now), 14)
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

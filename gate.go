package smtprelay

import "time"

// gate keeps new connections back where the relay, or the way to it, says "not now". It is guarded by the pool's lock.
type gate struct {
	failures  int       // of dials, one after another; those that failed together count once
	round     int       // counts failures: a dial that was begun in an earlier round failed together with others
	notBefore time.Time // no dial before
	showUntil time.Time // nor before this, while a new connection is to show that the relay works; zero: none is
	last      *Error    // of the last dial; nil once one has succeeded
	paused    bool      // last is about the credentials: whoever needs a new connection is told at once
}

const (
	authPause      = 30 * time.Second // without AUTH after credentials were refused; doubles
	authPauseMost  = 5 * time.Minute
	freshPauseMost = time.Minute     // the same, where others are given each time
	showingTime    = 5 * time.Second // for a new connection to show that the relay does its work
)

// open reports whether a dial may be begun while so many are under way. After a failure one is tried at a time.
func (g *gate) open(now time.Time, dialling int) bool {
	return g.failures == 0 || (dialling == 0 && !now.Before(g.opens()))
}

// opened notes that the relay does its work.
func (g *gate) opened() { g.failures, g.last, g.paused = 0, nil, false }

// dialled notes that a dial has succeeded. After a failure the next one waits until the relay has shown that it works on this
// connection, but not for long.
func (g *gate) dialled(now time.Time) {
	g.paused = false
	g.showUntil = now.Add(showingTime)
}

// notShown notes that such a connection has ended and it was not the relay's fault: nothing more is to be expected of it.
func (g *gate) notShown() { g.showUntil = time.Time{} }

// failed notes that a dial of the given round has failed with e, and that none is to be begun before notBefore.
func (g *gate) failed(e *Error, round int, notBefore time.Time, paused bool) {
	if round != g.round && g.last != nil {
		return // it failed together with others
	}
	g.round++
	g.failures++
	g.last = e.clone()
	g.notBefore, g.paused = notBefore, paused
	g.notShown()
}

func backoffUpTo(least, most time.Duration, failures int) time.Duration {
	if shift := failures - 1; shift < 16 && least<<shift < most {
		return least << shift
	}
	return most
}

// refusal is what to tell somebody who needs a new connection while the credentials are paused; nil if they are not.
func (g *gate) refusal(now time.Time) *Error {
	if !g.paused || !now.Before(g.notBefore) {
		return nil
	}
	return g.last.clone()
}

// opens is when the next dial may be begun; it may be in the past.
func (g *gate) opens() time.Time {
	if g.failures == 0 {
		return time.Time{}
	}
	return latest(g.notBefore, g.showUntil)
}

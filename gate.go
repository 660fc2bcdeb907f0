package smtprelay

import (
	"fmt"
	"math/rand/v2"
	"time"
)

// gate keeps new connections back where the relay, or the way to it, says "not now". It is guarded by the pool's lock.
type gate struct {
	failures  int       // of dials, one after another; those that failed together count once
	round     int       // counts failures: a dial that was begun in an earlier round failed together with others
	notBefore time.Time // no dial before
	last      *Error    // of the last dial; nil once one has succeeded
	paused    bool      // last is about the credentials: whoever needs a new connection is told at once
	timer     *time.Timer

	raiseAfter time.Duration // how long the cap stays as low as it is
	raiseAt    time.Time     // when it goes up by one; zero means it is not lowered
	raise      *time.Timer
	raised     bool // since it was lowered last
}

const (
	authPause     = 30 * time.Second // without AUTH after credentials were refused; doubles
	authPauseMost = 5 * time.Minute
	crowdWait     = 30 * time.Second // before a connection more is tried after "too many connections"; doubles
	crowdWaitMost = 10 * time.Minute
)

// open reports whether a dial may be begun while so many are under way. After a failure one is tried at a time.
func (g *gate) open(now time.Time, dialling int) bool {
	return g.failures == 0 || (dialling == 0 && !now.Before(g.notBefore))
}

// opened notes that a dial has succeeded.
func (g *gate) opened() { g.failures, g.last, g.paused = 0, nil, false }

// failed notes that a dial of the given round has failed with e. It reports false if that is no news.
func (g *gate) failed(e *Error, round int, cfg *settings, now time.Time) bool {
	if round != g.round && g.last != nil {
		return false
	}
	g.round++
	g.failures++
	g.last = e.clone()
	wait := cfg.Retry.backoff(g.failures)
	g.paused = e.Op == OpAuth && e.Reply.Code/100 == 5 && !e.Reply.says(tooManyConns, e.Op)
	if g.paused && cfg.Auth == nil {
		// The same credentials again: no use, and some relays lock the account.
		wait = backoffUpTo(authPause, authPauseMost, g.failures)
	}
	g.notBefore = now.Add(wait)
	return true
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

// wakeAt has p woken when the gate opens, if it is closed.
func (g *gate) wakeAt(now time.Time, p *pool) {
	if g.failures == 0 || g.timer != nil || !now.Before(g.notBefore) {
		return
	}
	g.timer = time.AfterFunc(g.notBefore.Sub(now), p.wake)
}

// awake is called by the timers.
func (g *gate) awake(now time.Time, p *pool) {
	if g.timer != nil {
		// It may have been set for an earlier failure than the last: wakeAt sets it anew if it is still too early.
		g.timer.Stop()
		g.timer = nil
	}
	if g.raiseAt.IsZero() || now.Before(g.raiseAt) {
		return
	}
	g.raised = true
	if p.slots.raise() {
		g.raiseAt = now.Add(g.raiseAfter)
		g.raise = time.AfterFunc(g.raiseAfter, p.wake)
	} else {
		g.raiseAt, g.raiseAfter = time.Time{}, 0
	}
}

// crowded lowers the cap to the number of connections that work or may yet, for a while.
func (g *gate) crowded(working int, now time.Time, p *pool) {
	if limit := p.slots.limit(); limit <= max(working, 1) && !g.raiseAt.IsZero() {
		return // one of several that were refused together
	}
	p.slots.lower(working)
	limit := p.slots.limit()
	p.cfg.profile.learned(LearnedInfo{Lesson: LessonMaxConns, Limit: limit, Text: fmt.Sprintf("the relay says that there are too many connections: %d at most, for a while", limit)})
	switch {
	case g.raiseAfter == 0:
		g.raiseAfter = crowdWait
	case g.raised: // too soon
		g.raiseAfter = min(2*g.raiseAfter, crowdWaitMost)
	}
	g.raised = false
	// A random part more, so that clients that share an allowance do not come back together.
	wait := g.raiseAfter + rand.N(g.raiseAfter/4)
	g.raiseAt = now.Add(wait)
	if g.raise != nil {
		g.raise.Stop()
	}
	g.raise = time.AfterFunc(wait, p.wake)
}

// stop ends the timers.
func (g *gate) stop() {
	for _, t := range []*time.Timer{g.timer, g.raise} {
		if t != nil {
			t.Stop()
		}
	}
}

package smtprelay

import (
	"fmt"
	"time"
)

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

// An outage: nothing gets through.

// throughLocked is when the relay did its work last. To say that messages come too fast is none.
func (p *pool) throughLocked() time.Time {
	if !p.pace.cutAt.IsZero() {
		return p.pace.recent.last(p.pace.first)
	}
	return p.through
}

// expectOutageLocked has somebody look when w, who begins to wait, has waited for too long.
func (p *pool) expectOutageLocked(w *waiter) {
	if limit := p.cfg.Timeouts.Outage; limit > 0 {
		p.outageAt = earliest(p.outageAt, latest(w.since, p.throughLocked()).Add(limit))
	}
}

// outage reports whether nothing has got through for Timeouts.Outage, and a message has waited for so long.
func (p *pool) outage(waited time.Duration) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	limit := p.cfg.Timeouts.Outage
	return limit > 0 && waited >= limit && time.Since(p.throughLocked()) >= limit
}

// endOutageLocked tells those who have waited for Timeouts.Outage while nothing got through.
func (p *pool) endOutageLocked(now time.Time) {
	if p.outageAt.IsZero() || now.Before(p.outageAt) {
		return
	}
	for s := range p.sessions {
		if s.Info().Decided {
			p.through = latest(p.through, s.Moved())
		}
	}
	p.outageAt = time.Time{}
	p.queue.all(func(w *waiter) {
		if now.Sub(latest(w.since, p.throughLocked())) >= p.cfg.Timeouts.Outage {
			p.failLocked(w, p.outageErrorLocked())
		} else {
			p.expectOutageLocked(w)
		}
	})
}

// latest returns the later of two times.
func latest(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// outageErrorLocked is the error of a Send that has waited for Timeouts.Outage.
func (p *pool) outageErrorLocked() *Error {
	note := fmt.Errorf("no message got through for %v (Timeouts.Outage)", p.cfg.Timeouts.Outage)
	last := p.gate.last
	if last == nil && !p.pace.cutAt.IsZero() {
		last = &Error{Op: OpWait, Outcome: NotAccepted, Scope: ScopeRelay}
		last.Reply, last.Err = toOthers(p.pace.said)
	}
	if last == nil {
		return &Error{Op: OpWait, Outcome: NotAccepted, Scope: ScopeRelay, Err: p.explainLocked(note)}
	}
	e := last.clone()
	if e.Err != nil {
		note = fmt.Errorf("%w; %v", e.Err, note)
	}
	e.Err = note
	return e
}

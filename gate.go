package smtprelay

import (
	"fmt"
	"time"
)

// gate is the circuit breaker for dials: it backs off after failures. It is guarded by the pool's lock.
type gate struct {
	failures  int       // consecutive failures of dials; dials that fail together count once
	round     int       // number of failures so far; dials of the same round fail together
	notBefore time.Time // no dial begins before this time
	showUntil time.Time // no dial begins before this time, while a new connection shows that the relay works; zero: no such connection
	last      *Error    // the last dial's error; nil once the relay works again
	paused    bool      // last is a refusal of the credentials: a request that needs a new connection fails at once
}

const (
	authPause      = 30 * time.Second // pause of AUTH after the relay has refused credentials; doubles
	authPauseMost  = 5 * time.Minute
	freshPauseMost = time.Minute     // the maximum if each attempt uses different credentials
	showingTime    = 5 * time.Second // how long dials wait for a new connection to show that the relay works
)

// open reports whether a dial may begin while dialling others are in progress. After a failure there is one dial at a time.
func (g *gate) open(now time.Time, dialling int) bool {
	return g.failures == 0 || (dialling == 0 && !now.Before(g.opens()))
}

// opened resets the gate: the relay has accepted or refused a message.
func (g *gate) opened() { g.failures, g.last, g.paused = 0, nil, false }

// dialled records that a dial has succeeded. After a failure, the next dial waits until the relay has accepted or refused a
// message on this connection, for showingTime at most.
func (g *gate) dialled(now time.Time) {
	g.paused = false
	g.showUntil = now.Add(showingTime)
}

// notShown ends the wait that dialled has begun: the connection has ended, and not by the relay's fault.
func (g *gate) notShown() { g.showUntil = time.Time{} }

// failed records that a dial of the given round has failed with e. No dial begins before notBefore.
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

// refusal returns the error for a request that needs a new connection while AUTH is paused; nil if AUTH is not paused.
func (g *gate) refusal(now time.Time) *Error {
	if !g.paused || !now.Before(g.notBefore) {
		return nil
	}
	return g.last.clone()
}

// opens returns when the next dial may begin; the time may be in the past.
func (g *gate) opens() time.Time {
	if g.failures == 0 {
		return time.Time{}
	}
	return latest(g.notBefore, g.showUntil)
}

// Outages: the relay accepts nothing.

// throughLocked returns when the relay last accepted or refused a message. A reply that messages come too fast does not count.
func (p *pool) throughLocked() time.Time {
	if accepted, slowed := p.pace.Slowed(); slowed {
		return accepted
	}
	return p.through
}

// expectOutageLocked schedules endOutageLocked for when w may have waited for Timeouts.Outage.
func (p *pool) expectOutageLocked(w *waiter) {
	if limit := p.cfg.Timeouts.Outage; limit > 0 {
		p.outageAt = earliest(p.outageAt, latest(w.since, p.throughLocked()).Add(limit))
	}
}

// outage reports whether the relay has accepted nothing for Timeouts.Outage, and a message has waited for as long.
func (p *pool) outage(waited time.Duration) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	limit := p.cfg.Timeouts.Outage
	return limit > 0 && waited >= limit && time.Since(p.throughLocked()) >= limit
}

// endOutageLocked fails the waiters that have waited for Timeouts.Outage without any message getting through.
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

// outageErrorLocked returns the error of a Send that has waited for Timeouts.Outage.
func (p *pool) outageErrorLocked() *Error {
	note := fmt.Errorf("no message got through for %v (Timeouts.Outage)", p.cfg.Timeouts.Outage)
	last := p.gate.last
	if _, slowed := p.pace.Slowed(); last == nil && slowed {
		last = &Error{Op: OpWait, Outcome: NotAccepted, Scope: ScopeRelay}
		last.Reply, last.Err = toOthers(p.throttled)
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

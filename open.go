package smtprelay

import (
	"context"
	"time"

	"github.com/smtprelay/smtprelay/internal/conn"
)

// When the pool opens a connection, what happens when one is open, and what happens when one fails.

// mayDialLocked reports whether a connection would be opened if there were more waiters than there are.
func (p *pool) mayDialLocked(more int, now time.Time) bool {
	waiting := p.waiters.len + more
	return !p.draining && p.slots.open < p.slots.limit() && waiting > p.dialling+p.lastRoom && p.gate.open(now, p.dialling)
}

// Sessions near their last transaction are counted: while they have room for everyone who waits, one more connection would
// hardly be used. At the end of a burst, ten sessions that are almost used up are not followed by an eleventh. A session that
// has said nothing for a while is not relied on.

// endingTrust is how long somebody may wait for a session near its end, rather than for a new connection.
const endingTrust = time.Second

// roomLocked notes how many transactions s has room for, if it is near its last.
func (p *pool) roomLocked(s *session, room int) {
	room = max(room, 0)
	p.lastRoom += room - s.lastRoom
	s.lastRoom = room
}

// countRoomLocked counts anew, where somebody has waited for long enough.
func (p *pool) countRoomLocked(now time.Time) {
	if p.trustUntil.IsZero() || now.Before(p.trustUntil) {
		return
	}
	p.trustUntil = time.Time{}
	for s := range p.sessions {
		p.roomLocked(s, s.LastRoom(now.Add(-endingTrust)))
	}
}

// fillLocked opens connections for those who wait, as far as the cap and the gate allow, and has the others overlap. It is
// called whenever one of these may have changed.
func (p *pool) fillLocked(now time.Time) {
	for p.mayDialLocked(0, now) && p.slots.take() {
		ctx := context.WithoutCancel(p.waiters.last.ctx)
		p.dialling++
		p.lastID++
		id, round, usedUp := p.lastID, p.gate.round, p.usedUp
		p.running.Go(func() { p.openSession(ctx, id, round, usedUp) })
	}
	for p.waiters.len > p.dialling {
		s := p.overlapLocked(now)
		if s == nil {
			break
		}
		p.serveLocked(s)
	}
	if p.waiters.len > 0 && p.lastRoom > 0 && p.trustUntil.IsZero() {
		p.trustUntil = now.Add(endingTrust)
	}
	p.planLocked(now)
}

// openSession opens a connection, for which a slot was taken. It goes on if the Send it was begun for gives up, and serves
// whoever waits longest when it is done.
func (p *pool) openSession(ctx context.Context, id int64, round, usedUp int) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(p.closing, cancel)()
	s, leave, err := p.dial(ctx, id)
	if err != nil {
		p.mu.Lock()
		p.dialling--
		p.failedLocked(err, round)
		p.mu.Unlock()
		leave()
		p.mu.Lock()
		p.freeLocked()
		p.mu.Unlock()
		return
	}
	s.pool, s.round = p, round
	s.sendAway = func() {
		defer p.running.Done()
		s.Conn.SendAway()
	}
	s.Bound(spread(s.Limit(), usedUp, p.cfg.Limits.MaxConns), s.Expires())
	p.mu.Lock()
	p.dialling--
	s.held = true
	p.sessions[s] = struct{}{}
	p.running.Go(s.ReadLoop)
	alone := s.PendingAuth() && p.waiters.len == 0 && !p.draining
	if !s.PendingAuth() {
		p.gate.opened()
	}
	if !alone {
		p.releaseLocked(s) // at once: between, whoever it is for would seem to need one more dial
	}
	p.mu.Unlock()
	if p.closing.Err() != nil { // Close may have swept p.sessions before this one was added
		s.Kill(ErrClosed)
	}
	if alone {
		p.authenticate(ctx, s)
		p.release(s)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fillLocked(time.Now()) // only one dial ran while the gate was closed; start the rest
}

// spread returns how many of limit transactions a session has that was begun when usedUp others had been used up without a
// pause, conns of them at a time. Sessions that are opened together are used up together under load, and so would be those
// that follow them, for ever: so those that follow the second conns have from half to all of the limit. The earlier ones
// have all of it, since a burst that ends soon would pay for the spread and have nothing of it.
func spread(limit, usedUp, conns int) int {
	if n := usedUp - conns; n > 0 && n < conns {
		return max(limit*(conns+n)/(2*conns), min(limit, 1))
	}
	return limit
}

// sessionClosed is told by a session that the relay has closed it.
func (p *pool) sessionClosed(s *session) {
	info := s.Info()
	p.mu.Lock()
	s.at.remove()
	p.roomLocked(s, 0)
	delete(p.sessions, s)
	s.gone = true
	if info.Reason == conn.Full {
		p.usedUp++
	}
	if publicReply(info.Auth).says(tooManyConns, OpAuth) && p.slots.open > 1 {
		p.crowdedLocked() // before its place is free: its Send, which tells it too, may be later
	}
	p.freeLocked()
	if err := p.gate.refusal(time.Now()); err != nil && !p.workingLocked() {
		p.failAllLocked(err)
	}
	p.mu.Unlock()
	p.traceClosed(s, info)
}

// freeLocked gives back the slot of a connection that is no more.
func (p *pool) freeLocked() {
	p.slots.free()
	if p.draining && p.slots.open == 0 {
		close(p.empty)
	}
	p.fillLocked(time.Now())
}

// workingLocked reports whether a session is open that may serve somebody yet.
func (p *pool) workingLocked() bool {
	now := time.Now()
	for s := range p.sessions {
		switch s.Status(now) {
		case conn.Free, conn.Overlappable:
			return true
		case conn.Busy:
			if s.Usable() {
				return true
			}
		}
	}
	return false
}

// open is how many connections are open or being opened.
func (p *pool) open() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.slots.open
}

// Failing.

// learn takes what the relay said on s that concerns more than the message at hand.
func (p *pool) learn(s *session, e *Error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case e.Op == OpAuth && e.Code != 0:
		p.failedLocked(e, s.round)
	case e.Code == 432:
		p.crowdedLocked()
	}
}

// authenticate sends the AUTH that was to lead the first transaction on s alone, if that is still to be sent. The write side
// is the caller's.
func (p *pool) authenticate(ctx context.Context, s *session) *Error {
	r, ok := s.Authenticate(ctx)
	if ok {
		p.worked()
		return nil
	}
	e := verdict(&Message{}, nil, &r)
	if e != nil {
		p.cfg.explainAuth(e)
		p.learn(s, e)
	}
	return e
}

// worked notes that a session has authenticated and does its work.
func (p *pool) worked() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.gate.failures > 0 {
		p.gate.opened()
		p.fillLocked(time.Now()) // only one dial ran while the gate was closed; start the rest
	}
}

// failedLocked takes the failure of a dial, or of the AUTH that was part of it. As long as another session works, nobody
// hears of it.
func (p *pool) failedLocked(e *Error, round int) {
	now := time.Now()
	working := p.workingLocked()
	if e.says(tooManyConns, e.Op) && (working || p.slots.open > 1) { // beside the one that was refused
		p.crowdedLocked()
		p.fillLocked(now)
		return
	}
	if !p.gate.failed(e, round, p.cfg, now) {
		return // one of several that failed together
	}
	if working {
		p.fillLocked(now)
		return
	}
	for w := p.waiters.first; w != nil; {
		next := w.at.next
		if w.attempts++; e.lasting() || p.cfg.Retry.exhausted(w.attempts) {
			p.failLocked(w, e)
		}
		w = next
	}
	p.fillLocked(now)
}

func (p *pool) failAllLocked(e *Error) {
	for w := p.waiters.first; w != nil; w = p.waiters.first {
		p.failLocked(w, e)
	}
}

// crowdedLocked holds slots back for a while: the relay says that there are too many connections. Those that are open go
// on, and so do those being opened: if there are too many of them too, the relay will say so to each.
func (p *pool) crowdedLocked() {
	if p.draining {
		return
	}
	open := p.dialling
	now := time.Now()
	for s := range p.sessions {
		if st := s.Status(now); st != conn.Lost && st != conn.Retired && !s.Failed() {
			open++
		}
	}
	p.slots.crowded(open, now)
	p.planLocked(now)
}

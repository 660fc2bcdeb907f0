package smtprelay

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/smtprelay/smtprelay/internal/backoff"
	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// Opening connections: when the pool dials, what follows success, and what follows failure.

// mayDialLocked reports whether to dial a connection if the queue had more waiters in addition.
func (p *pool) mayDialLocked(more int, now time.Time) bool {
	waiting := p.queue.len() + more
	return !p.draining && p.stopAsking == nil && p.idle.Len == 0 && p.slots.open < p.slots.limit() && waiting > p.dialling-p.slow+p.lastRoom && p.gate.open(now, p.dialling)
}

// slowDial is how long a dial may take before another dial is started in its place.
const slowDial = 10 * time.Second

// slowDialsLocked marks dials as slow, so that waiters no longer rely on them.
func (p *pool) slowDialsLocked(now time.Time) {
	for s := p.dials.First; s != nil && now.Sub(s.dialled) >= slowDial; s = p.dials.First {
		s.at.Remove()
		p.slow++
	}
}

// p.lastRoom counts the transactions left on sessions near their limit. While these are enough for all waiters, a new connection
// would hardly be used: the end of a burst, with ten sessions almost used up, needs no eleventh. A session that has received no
// reply for endingTrust is not counted.

// endingTrust is how long a waiter may wait for a session near its limit before a new connection is opened.
const endingTrust = time.Second

// roomLocked sets how many transactions s has left, if it is near its limit.
func (p *pool) roomLocked(s *session, room int) {
	room = max(room, 0)
	p.lastRoom += room - s.lastRoom
	s.lastRoom = room
}

// countRoomLocked recounts p.lastRoom once a waiter has waited for endingTrust.
func (p *pool) countRoomLocked(now time.Time) {
	if p.trustUntil.IsZero() || now.Before(p.trustUntil) {
		return
	}
	p.trustUntil = time.Time{}
	for s := range p.sessions {
		p.roomLocked(s, s.LastRoom(now.Add(-endingTrust)))
	}
}

// fillLocked opens connections for waiters, within the connection limit and the gate, and serves the other waiters with existing
// sessions. It must be called whenever the queue, the limit, the gate or the sessions may have changed.
func (p *pool) fillLocked(now time.Time) {
	for p.queue.len() > 0 && p.mayDialLocked(0, now) {
		if p.cfg.Limits.Slots != nil {
			p.askLocked()
			break
		}
		if !p.slots.take() {
			break
		}
		p.dialLocked(context.WithoutCancel(p.queue.next().ctx), Slot{}, now)
	}
	for p.queue.len() > 0 && !p.draining && p.pace.Ready(now) {
		s := p.idle.Last
		if s != nil || p.queue.len() > p.dialling-p.slow {
			s = p.freeLocked(0, now)
		}
		if s == nil {
			break
		}
		p.serveLocked(s, now)
	}
	if p.queue.len() > 0 && p.lastRoom > 0 && p.trustUntil.IsZero() {
		p.trustUntil = now.Add(endingTrust)
	}
	p.planLocked(now)
}

// dialLocked starts to open a connection, for which the caller has taken a slot. shared is the place from Limits.Slots, if any.
func (p *pool) dialLocked(ctx context.Context, shared Slot, now time.Time) {
	p.dialling++
	p.lastID++
	s, usedUp := &session{id: p.lastID, pool: p, round: p.gate.round, slot: shared, dialled: now}, p.usedUp
	p.dials.PushBack(s)
	if shared.Release != nil {
		s.closed = make(chan struct{})
	}
	p.running.Go(func() { p.openSession(ctx, s, usedUp) })
}

// openSession opens a connection, for which the caller has taken a slot. The dial continues if the Send that caused it is
// cancelled; the new session goes to the oldest waiter.
func (p *pool) openSession(ctx context.Context, s *session, usedUp int) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(p.closing, cancel)()
	leave, err := p.cfg.dial(ctx, s)
	if err != nil {
		p.mu.Lock()
		slow := p.dialledLocked(s)
		p.failedLocked(err, s.round, slow)
		p.mu.Unlock()
		leave()
		s.giveBack(ctx.Err() == nil)
		p.mu.Lock()
		p.freeSlotLocked()
		p.mu.Unlock()
		return
	}
	s.sendAway = func() {
		defer p.running.Done()
		s.Conn.SendAway()
	}
	s.Bound(spread(s.Limit(), usedUp, p.cfg.Limits.MaxConns), s.Expires())
	p.mu.Lock()
	p.dialledLocked(s)
	s.held = true
	p.sessions[s] = struct{}{}
	p.running.Go(s.ReadLoop)
	if shared := &s.slot; shared.Retire != nil || shared.Lost != nil {
		p.running.Go(func() { p.watchSlot(s) })
	}
	p.gate.dialled(time.Now())
	s.round = p.gate.round
	alone := s.PendingAuth() && p.queue.len() == 0 && !p.draining
	if !alone {
		p.releaseLocked(s) // before unlocking: otherwise the waiter for s would seem to need another dial
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
	p.fillLocked(time.Now()) // only one dial ran while the gate was closed; start the others
}

// dialledLocked records that the dial of s has ended, and reports whether it was slow.
func (p *pool) dialledLocked(s *session) (slow bool) {
	p.dialling--
	if slow = s.at.In == nil; slow {
		p.slow--
	}
	s.at.Remove()
	if s.greeted {
		p.greeted--
	}
	return slow
}

// hasGreeted is called when the relay has greeted s.
func (p *pool) hasGreeted(s *session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !s.greeted {
		s.greeted = true
		p.greeted++
	}
	if p.crowdRound == s.round+1 { // the relay refused another dial of this round, so it did not refuse all connections
		p.crowdRound = 0
		p.crowdedLocked()
	}
}

// spread returns the transaction limit of a new session, at most limit. usedUp is the number of sessions that were used up
// without a pause, conns of them at a time.
//
// Under load, sessions that are opened together are used up together, and so would be their successors. To spread the
// replacements over time, the second generation of conns sessions gets from half to all of limit. Earlier sessions get all of
// limit, because a short burst would not benefit from spreading.
func spread(limit, usedUp, conns int) int {
	if n := usedUp - conns; n > 0 && n < conns {
		return max(limit*(conns+n)/(2*conns), min(limit, 1))
	}
	return limit
}

// sessionClosed is called when the relay has closed the connection of s.
func (p *pool) sessionClosed(s *session) {
	info := s.Info()
	s.giveBack(!info.Killed)
	p.mu.Lock()
	s.at.Remove()
	p.roomLocked(s, 0)
	delete(p.sessions, s)
	s.gone = true
	if info.Reason == conn.Full {
		p.usedUp++
	}
	p.lostLocked(s, info) // before the slot is free, so that the next dial sees this failure
	p.freeSlotLocked()
	if err := p.gate.refusal(time.Now()); err != nil && !p.workingLocked() {
		p.failAllLocked(err)
	}
	p.mu.Unlock()
	p.traceClosed(s, info)
}

// lostLocked counts the end of s as a failed dial if the relay has not accepted or refused a message on s. So the pool backs off
// from a relay that closes connections at AUTH or MAIL, or refuses every message there, as it does from one that cannot be
// reached.
func (p *pool) lostLocked(s *session, info conn.Info) {
	var ours *conn.GivenUpError
	if info.LedByAuth && publicReply(info.Auth).says(saysTooManyConns, OpAuth) {
		p.crowdedLocked()
		if !p.workingLocked() {
			p.gateFailedLocked(p.cfg.refusedAuth(info.Auth), s.round, time.Now())
		}
		return
	}
	byRule := info.Reason != conn.Fault && (info.Reason != conn.Full || info.Used == 0)
	if info.Decided || info.LedByAuth || p.draining || info.Used == 0 && s.lostIdle || byRule || errors.As(info.Err, &ours) {
		if s.round == p.gate.round {
			p.gate.notShown()
		}
		return
	}
	e := p.endOf(info)
	crowd := false
	if cause, ok := info.Err.(*conn.ReplyError); ok {
		crowd = publicReply(cause.Reply).says(tooManyConns, opOf(cause.Step))
	}
	now := time.Now()
	if crowd && p.workingLocked() {
		p.crowdedLocked()
	} else {
		p.gateFailedLocked(e, s.round, now)
	}
	p.fillLocked(now)
}

// endOf returns the error for waiting messages after a connection has ended.
func (p *pool) endOf(info conn.Info) *Error {
	e := &Error{Op: OpWait, Outcome: NotAccepted, Scope: ScopeRelay, Err: errNoWork}
	switch cause := info.Err.(type) {
	case nil:
	case *conn.AuthError:
		return p.cfg.refusedAuth(cause.Reply)
	case *conn.ReplyError:
		e.Reply, e.Err = toOthers(publicReply(cause.Reply))
	case *conn.UnexpectedReply:
		e.Reply, e.Err = toOthers(publicReply(cause.Reply))
	case *wire.MalformedError:
		e.Err = errors.New("the last connection ended: a malformed reply")
	default:
		e.Err = info.Err
	}
	return e
}

var errNoWork = errors.New("the connection ended before the relay had accepted or refused a message")

// toOthers returns the part of r, a reply to one message, that the errors of other messages may contain. That is all of a 421,
// which is about the connection (RFC 5321, 3.8), and only the codes of another refusal, because its text may name addresses.
func toOthers(r Reply) (Reply, error) {
	switch {
	case r.Code == 421:
		return r, nil
	case r.Code < 400:
		return Reply{}, fmt.Errorf("the relay is out of step: it replied %d to another message", r.Code)
	}
	r.Message = ""
	return r, errToOther
}

var errToOther = errors.New("the relay sent this reply to another message")

// freeSlotLocked frees the slot of a connection that is closed or was never opened.
func (p *pool) freeSlotLocked() {
	p.slots.free()
	if p.draining && p.slots.open == 0 {
		close(p.empty)
	}
	p.fillLocked(time.Now())
}

// workingLocked reports whether an open session may take a transaction, now or later.
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

// Failing.

// accepted records that the relay has accepted a message. round is the round of its grant.
func (p *pool) accepted(round int) { p.pace.Accepted(round, time.Now()) }

// slowDown is called when the relay has refused a message because messages come too fast. round is the round of the message's
// grant; cut says whether to lower the pace. slowDown reports whether to retry the message, which it does not if nothing was
// accepted for Timeouts.Outage.
func (p *pool) slowDown(e *Error, round int, cut bool) bool {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pace.Off() {
		return false
	}
	p.throttled = e.Reply
	if cut && p.pace.TooFast(round, now) {
		rate := p.pace.Rate(now)
		p.cfg.profile.learned(LearnedInfo{Lesson: LessonPace, Limit: max(int(rate), 1), Text: fmt.Sprintf("the relay says that messages come too fast: %.3g a second from now on", rate)})
		p.planLocked(now)
	}
	limit := p.cfg.Timeouts.Outage
	return limit == 0 || now.Sub(p.throughLocked()) < limit
}

// distrust ends the sessions that have been idle for longIdle, because a session that was idle for so long turned out to be dead: a
// firewall may have dropped the others too.
func (p *pool) distrust(longIdle time.Duration) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	for s := p.idle.First; s != nil && now.Sub(s.idleSince) >= longIdle; s = p.idle.First {
		s.Retire(conn.Idle)
		p.settleLocked(s, now)
	}
}

// crowd is called when the relay has replied that there are too many connections.
func (p *pool) crowd() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.crowdedLocked()
}

// authenticate sends the pending AUTH of s without a transaction, if it was not sent yet. The caller holds the write side.
func (p *pool) authenticate(ctx context.Context, s *session) *Error {
	r, ok := s.Authenticate(ctx)
	if ok {
		return nil
	}
	e := verdict(&Message{}, nil, &r)
	if e != nil && e.Op == OpAuth && e.Reply.Code != 0 {
		p.cfg.explainAuth(e)
		p.mu.Lock()
		defer p.mu.Unlock()
		p.failedLocked(e, s.round, false)
	}
	return e
}

// failedLocked handles the failure of a dial, or of the AUTH that belongs to it. While another session works, no waiter sees the
// error. Otherwise the waiters fail that do not want to wait, or that another dial cannot help. While a dial is in progress that
// is not slow, the waiters wait for it, unless the failed dial was slow itself.
func (p *pool) failedLocked(e *Error, round int, slow bool) {
	now := time.Now()
	p.slowDialsLocked(now)
	working := p.workingLocked()
	if e.Reply.says(tooManyConns, e.Op) && (working || p.greeted > 0) { // the relay accepts another connection
		p.crowdedLocked()
		if !working {
			p.gateFailedLocked(e, round, now) // the other dials may still be refused
		}
		p.fillLocked(now)
		return
	}
	if e.Reply.says(tooManyConns, e.Op) && p.dialling > 0 {
		p.crowdRound = round + 1
	}
	p.gateFailedLocked(e, round, now)
	if !working && (slow || p.dialling == p.slow) { // otherwise a dial in progress may serve the waiters
		p.queue.all(func(w *waiter) {
			if w.failed++; w.failFast || w.once || e.lasting() && !p.forNow(e) {
				p.failLocked(w, e)
			}
		})
	}
	p.fillLocked(now)
}

// forNow reports whether e is a refusal of credentials that the relay has accepted before: the fault is likely the relay's and
// temporary.
func (p *pool) forNow(e *Error) bool {
	return e.Op == OpAuth && e.Reply.Code != 0 && p.cfg.profile.proven.Load()
}

// gateFailedLocked closes the gate for a while because of e.
func (p *pool) gateFailedLocked(e *Error, round int, now time.Time) {
	failures := p.gate.failures + 1
	wait, paused := p.cfg.Retry.backoff(failures), false
	switch auth := e.Op == OpAuth && !e.Reply.says(tooManyConns, e.Op); {
	case auth && e.Reply.says(tooManyLogins, e.Op):
		wait = backoff.Doubled(authPause, authPauseMost, failures)
	case auth && failures > 1 && !p.cfg.profile.proven.Load() && isSilence(e.Err):
		wait = authPause // the relay may be silent because the credentials are wrong
	case auth && e.Reply.Code/100 == 5 && p.cfg.Auth == nil && !p.forNow(e):
		// Repeating the same credentials cannot help, and some relays lock the account.
		wait, paused = backoff.Doubled(authPause, authPauseMost, failures), true
	}
	p.gate.failed(e, round, now.Add(wait), paused)
}

// isSilence reports whether err means that a reply did not arrive in time.
func isSilence(err error) bool {
	_, silent := errors.AsType[*conn.TimeoutError](err)
	return silent
}

// failAllLocked fails every waiter with e.
func (p *pool) failAllLocked(e *Error) {
	p.queue.all(func(w *waiter) { p.failLocked(w, e) })
}

// crowdedLocked lowers the connection limit for a while, because the relay has replied that there are too many connections. Open
// connections continue, and so do dials in progress: if they are too many as well, the relay will refuse each of them.
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
	if p.slots.crowded(open, now) {
		limit := p.slots.limit()
		p.cfg.profile.learned(LearnedInfo{Lesson: LessonMaxConns, Limit: limit, Text: fmt.Sprintf("the relay says that there are too many connections: %d at most, for a while", limit)})
	}
	p.planLocked(now)
}

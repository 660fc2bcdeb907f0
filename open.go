package smtprelay

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// When the pool opens a connection, what happens when one is open, and what happens when one fails.

// mayDialLocked reports whether a connection would be opened if there were more waiters than there are.
func (p *pool) mayDialLocked(more int, now time.Time) bool {
	waiting := p.queue.len() + more
	return !p.draining && p.stopAsking == nil && p.idle.Len == 0 && p.slots.open < p.slots.limit() && waiting > p.dialling-p.slow+p.lastRoom && p.gate.open(now, p.dialling)
}

// slowDial is how long a dial may take before others are begun in its place.
const slowDial = 10 * time.Second

// slowDialsLocked notes which dials take long: nobody counts on them.
func (p *pool) slowDialsLocked(now time.Time) {
	for s := p.dials.First; s != nil && now.Sub(s.dialled) >= slowDial; s = p.dials.First {
		s.at.Remove()
		p.slow++
	}
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

// fillLocked opens connections for those who wait, as far as the cap and the gate allow, and serves the others with what there
// is. It is called whenever one of these may have changed.
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
	for p.queue.len() > 0 && !p.draining && p.pace.ready(now) {
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

// dialLocked begins to open a connection, for which a slot was taken; shared is its place of Limits.Slots, if there is that.
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

// openSession opens a connection, for which a slot was taken. It goes on if the Send it was begun for gives up, and serves
// whoever waits longest when it is done.
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
	p.fillLocked(time.Now()) // only one dial ran while the gate was closed
}

// dialledLocked notes that the dial of s is over, and reports whether it was slow.
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

// hasGreeted is told that the relay has greeted s.
func (p *pool) hasGreeted(s *session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !s.greeted {
		s.greeted = true
		p.greeted++
	}
	if p.crowdRound == s.round+1 { // so it was a crowd
		p.crowdRound = 0
		p.crowdedLocked()
	}
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
	s.giveBack(!info.Killed)
	p.mu.Lock()
	s.at.Remove()
	p.roomLocked(s, 0)
	delete(p.sessions, s)
	s.gone = true
	if info.Reason == conn.Full {
		p.usedUp++
	}
	p.lostLocked(s, info) // before its place is free: its Send, which is told too, may be later
	p.freeSlotLocked()
	if err := p.gate.refusal(time.Now()); err != nil && !p.workingLocked() {
		p.failAllLocked(err)
	}
	p.mu.Unlock()
	p.traceClosed(s, info)
}

// lostLocked takes the end of s for a failed dial, if it has ended before the relay did any work on it: a relay that hangs up at
// AUTH or at MAIL, or refuses each message there, is not dialled more often than one that cannot be reached.
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

// endOf is what other messages may be told of the end of a connection.
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

var errNoWork = errors.New("the relay accepts nothing and refuses no recipient")

// toOthers is what other messages may be told of r, the reply to a command of one message: 421, which is about the connection (RFC
// 5321, 3.8), and else the codes of a refusal alone, since its words may name addresses.
func toOthers(r Reply) (Reply, error) {
	switch {
	case r.Code == 421:
		return r, nil
	case r.Code < 400:
		return Reply{}, fmt.Errorf("the relay is out of step: it said %d to another message", r.Code)
	}
	r.Message = ""
	return r, errToOther
}

var errToOther = errors.New("the relay said so to another message")

// freeSlotLocked gives back the slot of a connection that is no more.
func (p *pool) freeSlotLocked() {
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

// Failing.

// accepted notes that the relay has accepted a message.
func (p *pool) accepted() { p.pace.recent.add(time.Now()) }

// slowDown is told when the relay has refused a message because messages come too fast; round is that of its grant, and cut tells
// whether it may slow the others down. It reports whether it is of use to wait: not where nothing was accepted for
// Timeouts.Outage.
func (p *pool) slowDown(e *Error, round int, cut bool) bool {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pace.off {
		return false
	}
	p.pace.said = e.Reply
	if cut && p.pace.tooFast(round, now) {
		p.cfg.profile.learned(LearnedInfo{Lesson: LessonPace, Limit: max(int(p.pace.rate), 1), Text: fmt.Sprintf("the relay says that messages come too fast: %.3g a second from now on", p.pace.rate)})
		p.planLocked(now)
	}
	limit := p.cfg.Timeouts.Outage
	return limit == 0 || now.Sub(p.throughLocked()) < limit
}

// distrust ends the sessions that have been idle for as long as one that has turned out dead without a word: the way to the
// relay may have forgotten them all.
func (p *pool) distrust(longIdle time.Duration) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	for s := p.idle.First; s != nil && now.Sub(s.idleSince) >= longIdle; s = p.idle.First {
		s.Retire(conn.Idle)
		p.settleLocked(s, now)
	}
}

// crowd is told that the relay has said on s that there are too many connections.
func (p *pool) crowd() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.crowdedLocked()
}

// authenticate sends the AUTH that was to lead the first transaction on s alone, if that is still to be sent. The write side
// is the caller's.
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

// failedLocked takes the failure of a dial, or of the AUTH that was part of it. While another session works, nobody hears of
// it. Else those are told whom no other dial can help, and those who do not want to wait. Those that were begun in place of a
// slow one do not count.
func (p *pool) failedLocked(e *Error, round int, slow bool) {
	now := time.Now()
	p.slowDialsLocked(now)
	working := p.workingLocked()
	if e.Reply.says(tooManyConns, e.Op) && (working || p.greeted > 0) { // beside the one that was refused
		p.crowdedLocked()
		if !working {
			p.gateFailedLocked(e, round, now) // the others may be refused yet
		}
		p.fillLocked(now)
		return
	}
	if e.Reply.says(tooManyConns, e.Op) && p.dialling > 0 {
		p.crowdRound = round + 1
	}
	p.gateFailedLocked(e, round, now)
	if !working && (slow || p.dialling == p.slow) { // else one of those under way may serve them
		p.queue.all(func(w *waiter) {
			if w.failed++; w.failFast || w.once || e.lasting() && !p.forNow(e) {
				p.failLocked(w, e)
			}
		})
	}
	p.fillLocked(now)
}

// forNow reports whether e is a refusal of credentials that the relay has accepted before: it is out of order, not they.
func (p *pool) forNow(e *Error) bool {
	return e.Op == OpAuth && e.Reply.Code != 0 && p.cfg.profile.proven.Load()
}

// gateFailedLocked closes the gate for a while because of e.
func (p *pool) gateFailedLocked(e *Error, round int, now time.Time) {
	failures := p.gate.failures + 1
	wait, paused := p.cfg.Retry.backoff(failures), false
	switch auth := e.Op == OpAuth && !e.Reply.says(tooManyConns, e.Op); {
	case auth && e.Reply.says(tooManyLogins, e.Op):
		wait = backoffUpTo(authPause, authPauseMost, failures)
	case auth && failures > 1 && !p.cfg.profile.proven.Load() && isSilence(e.Err):
		wait = authPause // it may be the answer to wrong credentials
	case auth && e.Reply.Code/100 == 5 && p.cfg.Auth == nil && !p.forNow(e):
		// The same credentials again: no use, and some relays lock the account.
		wait, paused = backoffUpTo(authPause, authPauseMost, failures), true
	}
	p.gate.failed(e, round, now.Add(wait), paused)
}

// isSilence reports whether err tells that a reply did not come in time.
func isSilence(err error) bool {
	_, silent := errors.AsType[*conn.TimeoutError](err)
	return silent
}

// failAllLocked tells e to everybody who waits.
func (p *pool) failAllLocked(e *Error) {
	p.queue.all(func(w *waiter) { p.failLocked(w, e) })
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
	if p.slots.crowded(open, now) {
		limit := p.slots.limit()
		p.cfg.profile.learned(LearnedInfo{Lesson: LessonMaxConns, Limit: limit, Text: fmt.Sprintf("the relay says that there are too many connections: %d at most, for a while", limit)})
	}
	p.planLocked(now)
}

package smtprelay

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"
)

// Retry says how often a message is tried again when the relay cannot have accepted it: no connection could be opened, or
// it was lost before the final dot, or the relay said 421. A message that may have been accepted is never tried again.
type Retry struct {
	// MaxAttempts is how many tries a Send makes in all. 0 means 4; 1 means that nothing is tried again; negative means
	// that only the context ends it. An idle connection that turns out dead costs no attempt.
	MaxAttempts int

	// Before the next try a random part, from nothing to all, is waited of a time that is MinBackoff at first and doubles
	// each time, up to MaxBackoff. 0 means half a second and 30 seconds; neither may be negative.
	MinBackoff, MaxBackoff time.Duration

	// Temporary also tries again what the relay refused for now with a 4yz reply to MAIL, RCPT, DATA or the final dot.
	// By default that is told to the caller, who knows better how long the message can wait.
	Temporary bool
}

// withDefaults replaces zero by the default; MaxAttempts 0 means any number from here on.
func (r Retry) withDefaults() Retry {
	r.MaxAttempts = orDefault(r.MaxAttempts, 4)
	r.MinBackoff = orDefault(r.MinBackoff, 500*time.Millisecond)
	r.MaxBackoff = max(orDefault(r.MaxBackoff, 30*time.Second), r.MinBackoff)
	return r
}

// exhausted reports whether there is no try left after so many.
func (r Retry) exhausted(attempts int) bool { return r.MaxAttempts > 0 && attempts >= r.MaxAttempts }

// backoff is how long to wait after so many failures in a row: a random part of a time that doubles, so that many who fail
// together do not come back together.
func (r Retry) backoff(failures int) time.Duration {
	most := r.MaxBackoff
	if shift := failures - 1; r.MinBackoff < most>>min(shift, 63) { // the other way round it overflows after many failures
		most = r.MinBackoff << shift
	}
	return rand.N(most) + 1
}

// next is what follows a transaction that did not end with its message accepted.
type next int

const (
	stop      next = iota // the caller is told
	again                 // another try after a wait, as long as there are attempts left
	elsewhere             // at once and uncounted, on another session
	crowded               // on another session, once there is room: the relay says that there are too many connections
)

// mayRetry tells what follows a try of t that ended in e.
func (c *Client) mayRetry(t *transaction, e *Error) next {
	if e.Outcome != NotAccepted {
		return stop // the relay may have accepted it: only the caller can decide
	}
	if t.ctx.Err() != nil {
		return stop // nobody waits for another try
	}
	if t.bodyErr != nil || (t.bodyBegun && oneShot(t.m.Body)) {
		return stop // the message cannot be written, or not again
	}
	if e.Code == 432 {
		return crowded // Microsoft 365: "Concurrent connections limit exceeded"
	}
	if t.late(e) {
		return elsewhere // the session was used up or dead before this message came: not its fault
	}
	if e.Code == 0 || t.asked == 0 || (e.Code == 421 && e.Op != OpAuth) {
		return again // the relay is closing, or gone, and has taken nothing (RFC 5321, 3.8)
	}
	if e.Op == OpRset && t.overlapped {
		return elsewhere // the relay is out of step behind a final dot, which will not be tried again
	}
	if e.Op == OpAuth {
		switch {
		case e.says(tooManyConns, e.Op):
			return crowded
		case e.Code/100 == 3:
			return elsewhere // the relay takes no initial response: AUTH will go alone from now on
		case e.Code/100 == 4:
			return again
		}
		return stop // the credentials are refused
	}
	if e.Op == OpRset {
		return again // the session was at fault, not the message
	}
	if e.Code/100 < 4 {
		if t.overlapped {
			return elsewhere // a part of what stood behind the final dot was thrown away; that will not be tried again
		}
		return again // no refusal, but a relay that is out of step
	}
	if e.Op == OpMail && e.Code == 503 && !t.firstOnSession() {
		return again // our idea of the session's state was wrong
	}
	if e.Temporary() && c.cfg.Retry.Temporary {
		return again
	}
	return stop // when in doubt, tell the caller
}

// late reports whether t was not even begun for the relay, on a session that had dealt with another message before. So each
// such loss stands for a message that came to its end, which bounds how often it can happen.
func (t *transaction) late(e *Error) bool {
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	if t.s.used <= 1 || t.mailed.Class() == 2 {
		return false
	}
	if t.asked == 0 {
		return true // the session has ended before a word of this one, whatever the relay has said about that
	}
	return e.Code == 0 || e.Code == 421 || publicReply(t.mailed).says(idleTooLong, OpMail) || publicReply(t.mailed).says(tooManyMessages, OpMail)
}

func (t *transaction) firstOnSession() bool { return t.seq == 1 }

// sleep waits for d or the end of ctx or of the Client.
func sleep(ctx context.Context, d time.Duration, closed <-chan struct{}) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ended(ctx)
	case <-closed:
		return ErrClosed
	}
}

// ended is the error of a context that has ended, and its cause where that was given one of its own; nil if it has not.
func ended(ctx context.Context) error {
	err := ctx.Err()
	if cause := context.Cause(ctx); err != nil && cause != err { // it may end in between
		return fmt.Errorf("%w: %w", err, cause)
	}
	return err
}

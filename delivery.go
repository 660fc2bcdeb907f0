package smtprelay

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/smtprelay/smtprelay/internal/body"
	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/printable"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// delivery is one Send: the transactions that it takes until each recipient's fate is known.
type delivery struct {
	c       *Client
	ctx     context.Context
	m       Message
	msg     conn.Message // what the next transaction sends of it
	mail    MailOptions  // what the caller asks for
	utf8    string       // the first address that is not ASCII
	dsnFor  string       // the first recipient whose options need DSN; "" if there is none
	rrvsFor string       // the same for RRVS
	rcpts   rcptLimit    // how many recipients go into one transaction
	todo    []int        // recipients whose fate is open, as indexes into m.To, in the envelope's order
	receipt Receipt

	want      ask
	round     int       // of the pace, when the transaction was begun
	moves     int       // tries that failed and did not count
	slowed    int       // of all tries, those that came too fast for the relay
	slowedAt  time.Time // the first of these
	elsewhere int
	moved     bool   // it was tried on other connections often enough, since one refused it for now
	failed    int    // connections that could not be opened meanwhile
	attempts  int    // tries that failed and counted
	tries     int    // all of them
	unknown   *Error // of a transaction whose fate is unknown
	refusal   *Error // what the first recipient that was refused for itself was told
	failure   *Error // why the last transaction is to be tried again
}

// run makes transactions until nothing is left to do.
func (d *delivery) run() (Receipt, error) {
	if err := d.begin(); err != nil {
		return d.end(err)
	}
	if err := d.c.pool.enter(); err != nil {
		return d.end(err)
	}
	defer d.c.pool.leave()
	for len(d.todo) > 0 {
		g, err := d.c.pool.take(d.ctx, d.want)
		d.failed += g.failed
		d.want.waited += g.waited
		if err != nil {
			return d.end(d.lastWords(err))
		}
		s := g.session
		d.round, d.want.again, d.want.admitted = g.round, false, true
		rcpts, err := d.fit(s)
		if err != nil {
			d.c.pool.release(s)
			return d.end(err)
		}
		if len(rcpts) == 0 { // no more domains on this session
			s.Retire(conn.Full)
			d.c.pool.release(s)
			continue
		}
		if d.tries++; d.tries > 1 {
			d.c.cfg.stats.retries.Add(1)
		}
		t := conn.NewTransaction(d.ctx, s.Conn, d.msg)
		began := time.Now()
		r := t.Run()
		if r.Mail.Code == 0 && r.Lost != nil {
			d.want.waited += time.Since(began) // for nothing
		}
		err = d.settle(s, rcpts, r)
		t.Recycle()
		if err != nil {
			return d.end(err)
		}
	}
	return d.end(nil)
}

// settle takes in what became of a transaction on s for rcpts, and waits where another one is due after a while. An error
// ends the Send.
func (d *delivery) settle(s *session, rcpts []int, r conn.Result) *Error {
	e := verdict(&d.m, rcpts, &r)
	r = believed(r)
	d.msg.Body, d.msg.Size = r.Body, r.Size
	d.tellPool(s, &r, e)
	wait := d.note(rcpts, &r, e)
	d.c.cfg.explainRefusal(d.refusal, s.Extensions(), s.TLS() == nil)
	d.learnRcpts(&r, e)
	throttled := slices.ContainsFunc(r.Rcpt, func(reply wire.Reply) bool { return publicReply(reply).throttles(OpRcpt) })
	if e != nil && e.Op == OpRcpt && e.Reply.Code >= 400 && e.Reply.Code != 421 && !d.m.AllOrNothing && !throttled && !(r.Seq > 1 && e.Reply.endsSession(OpRcpt, r.Seq, r.Worked)) {
		e = nil // each of these recipients was refused for itself; the others have not been tried
	}
	used := r.BodyBegun && conn.OneShot(d.msg.Body)
	switch {
	case len(d.todo) == 0:
		return nil
	case e != nil:
		what := d.c.cfg.Retry.next(&r, e, d.moved)
		if what != giveUp && used {
			return bodyUsed(e)
		}
		return d.pause(what, e)
	case used:
		return &Error{Op: OpBody, Outcome: NotAccepted, Scope: ScopeMessage, Err: errBodyUsed}
	case throttled:
		return d.pause(waitForPace, wait)
	case wait != nil:
		return d.pause(retryLater, wait)
	}
	return nil
}

// tellPool tells the others of a transaction on s that ended in r with e, and completes the words of e.
func (d *delivery) tellPool(s *session, r *conn.Result, e *Error) {
	if e == nil {
		d.c.pool.accepted()
		return
	}
	d.c.cfg.explainAuth(e)
	d.c.cfg.explainRefusal(e, s.Extensions(), s.TLS() == nil)
	d.c.cfg.explainSilence(e, s.Extensions())
	if e.Reply.Code == 432 {
		d.c.pool.crowd()
	}
	if r.AfterIdle && r.Mail.Code == 0 && conn.IsTimeout(r.Lost) {
		d.c.pool.distrust(conn.LongIdle)
	}
}

// For a message that needs its body another time.
var (
	errBodyOnce = errors.New("the Body can be read only once: use Bytes, BodyFunc or a Reader that can seek")
	errBodyUsed = fmt.Errorf("the body was needed again, for the recipients that the first transaction did not have; %w", errBodyOnce)
)

// bodyUsed adds to e, after which the message would be tried again, why it is not.
func bodyUsed(e *Error) *Error {
	if e.Err == nil {
		e.Err = errBodyOnce
	} else {
		e.Err = fmt.Errorf("%w; no further try: %w", e.Err, errBodyOnce)
	}
	return e
}

// note writes down the fate of each of rcpts, the recipients of a transaction that ended in r with the verdict e. Those that
// wait for another transaction stay in d.todo; if that is because the relay refused them for now, the error says so.
func (d *delivery) note(rcpts []int, r *conn.Result, e *Error) (wait *Error) {
	queueID := ""
	if e == nil {
		final := publicReply(r.Final)
		queueID = findQueueID(final.Message)
		d.receipt.Reply, d.receipt.QueueID = final, queueID
	}
	var open []int
	for i, to := range rcpts {
		rcpt := &d.receipt.Recipients[to]
		if mailed(r) {
			rcpt.Reply = publicReply(r.Rcpt[i]) // else it is a consequence of what was refused before
		}
		refusal := func() *Error {
			return &Error{Op: OpRcpt, subject: printable.Address(rcpt.To), Reply: rcpt.Reply, Outcome: NotAccepted, Scope: ScopeRecipient}
		}
		switch fateOf(&d.m, r, i, e, d.c.cfg.Retry.On4xx, d.moved) {
		case fateAccepted:
			rcpt.Outcome, rcpt.QueueID = Accepted, queueID
		case fateUnknown:
			rcpt.Outcome = Unknown
			d.unknown = e
		case fateOpen:
			open = append(open, to)
			if rcpt.Reply.throttles(OpRcpt) {
				wait = refusal()
			}
		case fateLater:
			open = append(open, to)
			wait = refusal()
		case fateRefused:
			if d.refusal == nil || d.refusal.Op == OpCheck { // the relay's words go before ours
				d.refusal = refusal()
			}
		}
	}
	d.todo = d.todo[len(rcpts)-len(open):] // in place: there may be thousands, and a transaction for each
	copy(d.todo, open)
	return wait
}

// learnRcpts takes in what a transaction tells of how many recipients the relay takes in one.
func (d *delivery) learnRcpts(r *conn.Result, e *Error) {
	tooMany, sure := countTooMany(r)
	if !mailed(r) || tooMany == 0 && (e != nil || d.rcpts.most == 0) {
		return
	}
	accepted := r.Accepted()
	d.rcpts.took(len(r.Rcpt), accepted, tooMany)
	if tooMany == 0 || accepted > 0 && sure {
		d.c.cfg.profile.rcptsTaken(len(r.Rcpt), accepted, tooMany)
	}
}

const (
	movesMost = 10 // tries of a message that fail at once and do not count; the others count, whatever they are
	cutsMost  = 5  // tries of a message that come too fast for the relay, and slow the others down; it goes before them then
	movedMost = 3  // tries elsewhere, since what was said may be about the connection
)

// pause waits before the next try if there is one, as what says. Else it returns e, the reason.
func (d *delivery) pause(what next, e *Error) *Error {
	d.failure = e
	switch what {
	case waitForSlot, retryNow:
		what = retryNow // the others work, or the gate is closed, and whoever waits is served in turn
		if d.moves++; d.moves > movesMost {
			what = retryLater
		}
	case tryElsewhere:
		what = retryNow
		if d.elsewhere++; d.elsewhere >= movedMost {
			d.moved = true
		}
	case waitForPace:
		what = d.slowDown(e)
	}
	if what == retryNow {
		d.traceRetry(0, e)
		return nil
	}
	failures := d.slowed - cutsMost
	if what != waitForPace {
		d.attempts++
		failures = d.attempts
	}
	if what == giveUp || what == retryLater && (d.c.cfg.Retry.exhausted(d.attempts) || d.c.pool.outage(d.want.waited)) {
		return e
	}
	wait := d.c.cfg.Retry.backoff(failures)
	d.traceRetry(wait, e)
	if err := sleep(d.ctx, wait, d.c.pool.ending); err != nil {
		scope := ScopeCaller // who has ended the tries
		if e.Scope == ScopeRelay {
			scope = ScopeRelay
		}
		return d.lastWords(&Error{Op: e.Op, subject: e.subject, Outcome: NotAccepted, Scope: scope, Err: err})
	}
	return nil
}

// lastWords adds to e, which ends the tries without a word of the relay's, what the relay said to the last one.
func (d *delivery) lastWords(e *Error) *Error {
	if last := d.failure; last != nil && last.Reply.Code != 0 && e.Reply.Code == 0 {
		e.Op, e.subject, e.Reply = last.Op, last.subject, last.Reply
	}
	return e
}

// slowDown waits for the relay's pace. A message that the relay refuses again and again does not slow down the others any more, and
// waits by itself: the relay may limit its sender or its recipient.
func (d *delivery) slowDown(e *Error) next {
	if d.slowed++; d.slowed == 1 {
		d.slowedAt = time.Now()
	}
	limit := d.c.cfg.Timeouts.Outage
	switch d.want.again = d.slowed <= cutsMost; {
	case !d.c.pool.slowDown(e, d.round, d.want.again):
		return giveUp
	case d.want.again:
		return retryNow
	case limit > 0 && time.Since(d.slowedAt) >= limit:
		return giveUp
	}
	return waitForPace
}

func (d *delivery) traceRetry(wait time.Duration, e *Error) {
	if t := d.c.cfg.Trace; t != nil && t.Retry != nil {
		t.Retry(d.ctx, RetryInfo{Name: d.c.cfg.Name, Addr: d.c.cfg.Addr, Message: d.m, Err: e, Attempt: d.attempts, Wait: wait})
	}
}

// shareReply gives the reply of e to the recipients still in d.todo, but for those that were refused for themselves.
func (d *delivery) shareReply(e *Error) {
	for _, to := range d.todo {
		if r := &d.receipt.Recipients[to]; r.Reply.Code/100 < 4 || e.Op != OpRcpt && e.Reply.Code/100 >= 4 {
			r.Reply = e.Reply
		}
	}
}

// end makes the receipt and the error of the whole. Recipients still in d.todo share the fate that e tells.
func (d *delivery) end(e *Error) (Receipt, error) {
	if e != nil {
		d.shareReply(e)
	}
	accepted, lasting := 0, false
	for i := range d.receipt.Recipients {
		r := &d.receipt.Recipients[i]
		if r.Outcome == Accepted {
			accepted++
		}
		lasting = lasting || r.Reply.Code >= 400 && !onlyForNow(r.Reply)
	}
	if e == nil && accepted == len(d.receipt.Recipients) {
		return d.receipt, nil
	}
	switch {
	case d.unknown != nil:
		e = d.unknown
	case e == nil:
		e = d.refusal
	}
	if d.m.AllOrNothing && lasting && e.Scope == ScopeRecipient {
		e.permanent = true // the others cannot get it without that one
	}
	e.Recipients = d.receipt.Recipients
	switch {
	case d.unknown != nil:
		e.Outcome = Unknown
	case accepted > 0:
		e.Outcome = Accepted
	default:
		e.Outcome = NotAccepted
	}
	if e.Attempts = d.attempts + d.failed; e.Op != OpCheck {
		e.Attempts = max(e.Attempts, 1)
	}
	return d.receipt, e
}

// begin checks the message and fills in what the delivery needs to know of it.
func (d *delivery) begin() *Error {
	d.todo = make([]int, len(d.m.To))
	d.receipt.Recipients = make([]RecipientResult, len(d.m.To))
	for i, to := range d.m.To {
		d.todo[i] = i
		d.receipt.Recipients[i] = RecipientResult{To: to, Outcome: NotAccepted}
	}
	if err := conn.ContextError(d.ctx); err != nil {
		return &Error{Op: OpCheck, Outcome: NotAccepted, Scope: ScopeCaller, Err: err}
	}
	checked := d.m
	if d.m.Body != nil {
		checked.Body = body.Again(d.m.Body)
	}
	if err := checked.check(); err != nil {
		return &Error{Op: OpCheck, Outcome: NotAccepted, Scope: ScopeMessage, Err: err, permanent: true}
	}
	if d.m.From == NullSender {
		d.m.From = ""
	}
	if d.m.MailOptions != nil {
		d.mail = *d.m.MailOptions
	}
	if !isASCII(d.m.From) {
		d.utf8 = d.m.From
	} else if i := slices.IndexFunc(d.m.To, func(to string) bool { return !isASCII(to) }); i >= 0 {
		d.utf8 = d.m.To[i]
	}
	d.msg = conn.Message{From: d.m.From, To: d.m.To, AllOrNothing: d.m.AllOrNothing, Body: checked.Body, Size: body.Size(checked.Body), BeforeEnd: d.m.BeforeEnd}
	if options := d.m.RcptOptions; len(options) > 0 {
		d.msg.Params = func(addr string) wire.RcptParams { return options[addr].params() }
	}
	d.want.urgent = d.m.Urgent
	d.want.failFast = d.m.FailFast
	d.want.once = d.c.cfg.Retry.MaxAttempts == 1
	if len(d.m.To) > 1 {
		d.rcpts = d.c.cfg.profile.maxRcpts()
	}
	for _, to := range d.m.To {
		if o := d.m.RcptOptions[to]; o != nil {
			if d.dsnFor == "" && o.needsDSN() {
				d.dsnFor = to
			}
			if d.rrvsFor == "" && o.needsRRVS() {
				d.rrvsFor = to
			}
		}
	}
	return nil
}

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

// delivery is one Send: it runs transactions until the outcome for each recipient is known.
type delivery struct {
	c       *Client
	ctx     context.Context
	m       Message
	msg     conn.Message // the next transaction's part of m
	mail    MailOptions  // the caller's options
	utf8    string       // the first address that is not ASCII
	dsnFor  string       // the first recipient whose options need DSN; "" if there is none
	rrvsFor string       // the first recipient whose options need RRVS; "" if there is none
	rcpts   rcptLimit    // maximum number of recipients in one transaction
	todo    []int        // recipients without an outcome, as indexes into m.To, in the envelope's order
	receipt Receipt

	want      ask
	round     int       // pace.Round when the transaction began
	moves     int       // failed attempts that did not count
	slowed    int       // attempts that came too fast for the relay
	slowedAt  time.Time // time of the first of these attempts
	elsewhere int       // attempts that ended with tryElsewhere
	moved     bool      // elsewhere has reached movedMost
	failed    int       // dials that failed while the message waited
	attempts  int       // failed attempts that counted
	tries     int       // all attempts
	unknown   *Error    // the error of a transaction with unknown outcome
	refusal   *Error    // the error of the first recipient that was refused
	failure   *Error    // why the last transaction is retried
}

// run runs transactions until no recipient is left to try.
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
		if len(rcpts) == 0 { // the session has reached the relay's limit of domains
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
			d.want.waited += time.Since(began) // the attempt achieved nothing, so its time counts as waiting
		}
		err = d.settle(s, rcpts, r)
		t.Recycle()
		if err != nil {
			return d.end(err)
		}
	}
	return d.end(nil)
}

// settle evaluates r, the result of a transaction on s for rcpts, and waits if the next transaction is due later. An error ends
// the Send.
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
		e = nil // the relay refused each of these recipients; the other recipients were not tried yet
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

// tellPool reports to the pool how a transaction on s ended, and completes the text of e.
func (d *delivery) tellPool(s *session, r *conn.Result, e *Error) {
	if e == nil {
		d.c.pool.accepted(d.round)
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

// Errors for a message whose one-shot Body is needed again.
var (
	errBodyOnce = errors.New("the Body can be read only once: use Bytes, BodyFunc or a Reader that can seek")
	errBodyUsed = fmt.Errorf("the body is needed again, for the recipients of another transaction; %w", errBodyOnce)
)

// bodyUsed adds to e that the message cannot be retried, because its Body is used up.
func bodyUsed(e *Error) *Error {
	if e.Err == nil {
		e.Err = errBodyOnce
	} else {
		e.Err = fmt.Errorf("%w; no retry: %w", e.Err, errBodyOnce)
	}
	return e
}

// note records the outcome for each of rcpts, the recipients of a transaction that ended in r with the verdict e. Recipients
// that need another transaction stay in d.todo. If the relay refused one of these temporarily, note returns the refusal.
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
			rcpt.Reply = publicReply(r.Rcpt[i]) // otherwise the reply is a consequence of an earlier refusal
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
			if d.refusal == nil || d.refusal.Op == OpCheck { // prefer the relay's error to ours
				d.refusal = refusal()
			}
		}
	}
	d.todo = d.todo[len(rcpts)-len(open):] // in place: there may be thousands of recipients, with a transaction for each
	copy(d.todo, open)
	return wait
}

// learnRcpts learns from a transaction how many recipients the relay accepts in one transaction.
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
	movesMost = 10 // attempts of a message that may fail at once without counting; later ones count
	cutsMost  = 5  // attempts of a message that, if throttled, lower the pace and go to the front of the queue
	movedMost = 3  // attempts on other connections, because the refusal may be about the connection
)

// pause waits before the next attempt, according to what. If there is no further attempt, it returns e.
func (d *delivery) pause(what next, e *Error) *Error {
	d.failure = e
	switch what {
	case waitForSlot, retryNow:
		what = retryNow // without a backoff here: other connections work, or the closed gate makes the message wait in the queue
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
		scope := ScopeCaller // the caller has ended the retries
		if e.Scope == ScopeRelay {
			scope = ScopeRelay
		}
		return &Error{Op: e.Op, subject: e.subject, Reply: e.Reply, Outcome: NotAccepted, Scope: scope, Err: err}
	}
	return nil
}

// lastWords adds the relay's reply to the last attempt to e, which ends the retries without a reply. A 5xx reply after which the
// message is retried was about the connection: in e it would look like a refusal of the message.
func (d *delivery) lastWords(e *Error) *Error {
	if last := d.failure; last != nil && last.Reply.Code/100 == 4 && e.Reply.Code == 0 {
		e.Op, e.subject, e.Reply = last.Op, last.subject, last.Reply
	}
	return e
}

// slowDown lowers the pace and says what to do with a throttled message. After cutsMost refusals the message no longer slows
// down the others and backs off by itself: the relay may limit its sender or its recipient.
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

// shareReply copies the reply of e to the recipients still in d.todo, except to recipients that the relay has refused individually.
func (d *delivery) shareReply(e *Error) {
	for _, to := range d.todo {
		if r := &d.receipt.Recipients[to]; r.Reply.Code/100 < 4 || e.Op != OpRcpt && e.Reply.Code/100 >= 4 {
			r.Reply = e.Reply
		}
	}
}

// end returns the receipt and the error of the Send. e is the error of the recipients still in d.todo.
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
		e.permanent = true // the other recipients cannot get the message without the refused one
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

// begin checks the message and initializes the delivery.
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

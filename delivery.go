package smtprelay

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/smtprelay/smtprelay/internal/printable"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// delivery is one Send: the transactions that it takes until each recipient's fate is known.
type delivery struct {
	c       *Client
	ctx     context.Context
	m       *Message
	mail    MailOptions // what the caller asks for
	utf8    string      // the first address that is not ASCII
	size    int64       // of the message in its canonical form; 0 if not known
	dsnFor  string      // the first recipient whose options need DSN; "" if there is none
	rrvsFor string      // the same for RRVS
	rcpts   rcptLimit   // how many recipients go into one transaction
	todo    []int       // recipients whose fate is open, as indexes into m.To, in the envelope's order
	receipt Receipt

	attempts int    // tries that failed and counted
	tries    int    // all of them
	unknown  *Error // of a transaction whose fate is unknown
	refusal  *Error // what the first recipient that was refused for itself was told
}

// run makes transactions until nothing is left to do.
func (d *delivery) run() (Receipt, error) {
	for len(d.todo) > 0 {
		s, err := d.c.pool.take(d.ctx, &d.attempts)
		if err != nil {
			return d.end(err)
		}
		mail, rcpts, err := d.fit(s)
		if err != nil {
			d.c.pool.giveBack(s)
			return d.end(err)
		}
		if len(rcpts) == 0 { // no more domains on this session
			s.retire(closeFull)
			d.c.pool.giveBack(s)
			continue
		}
		if d.tries++; d.tries > 1 {
			d.c.cfg.stats.retries.Add(1)
		}
		t := newTransaction(d.ctx, s, d.m, d.size, mail, rcpts)
		t.run(d.c.pool)
		e := t.verdict()
		if e != nil {
			d.c.pool.learn(s, e)
		}
		if t.authed() {
			d.c.pool.worked()
		}
		wait := d.note(t, e)
		if e != nil && e.Op == OpRcpt && e.Code/100 >= 4 && e.Code != 421 && !d.m.AllOrNothing {
			e = nil // each of these recipients was refused for itself; the others have not been tried
		}
		d.size = t.size
		used := t.bodyBegun && oneShot(d.m.Body)
		if e == nil && used && len(d.todo) > 0 {
			err = &Error{Op: OpBody, Outcome: NotAccepted, Err: errBodyUsed}
		} else if e == nil && wait != nil {
			err = d.pause(again, wait)
		} else if e != nil && len(d.todo) > 0 {
			err = d.pause(d.c.mayRetry(t, e), e)
		}
		t.recycle()
		if err != nil {
			return d.end(err)
		}
	}
	return d.end(nil)
}

// note writes down what a transaction that ended in e, nil if it was accepted, means for its recipients. Those of them
// that wait for another transaction stay in d.todo; if that is because the relay refused them for now, the error says so.
func (d *delivery) note(t *transaction, e *Error) (wait *Error) {
	outcome, final := Accepted, Reply{}
	if e != nil {
		outcome = e.Outcome
	}
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	replies := t.rcpt
	if outcome == Accepted {
		final = publicReply(t.final)
	}
	mailed := t.mailed.Class() == 2 && t.authErr == nil

	queueID := ""
	if outcome == Accepted {
		queueID = findQueueID(final.Message)
		d.receipt.Reply, d.receipt.QueueID = final, queueID
	}
	accepted := t.acceptedRcpts()
	var open []int
	tooMany, number := 0, true // number: what was too many was the number of recipients, and not some of them
	for i, to := range t.rcpts {
		r := &d.receipt.Recipients[to]
		r.Reply = publicReply(replies[i])
		if r.says(tooManyRcpts, OpRcpt) {
			tooMany++
			number = number && (r.says(numberOfRcpts, OpRcpt) || r.EnhancedCode == EnhancedCode{} && len(t.rcpts) > 2)
		} else if r.Code/100 == 2 && tooMany > 0 {
			number = false
		}
		switch code := r.Code; {
		case outcome == Unknown && (code == 0 || code/100 == 2):
			// In chunks the message leaves with its envelope, whose replies may be missing.
			r.Outcome = Unknown
			d.unknown = e
		case outcome == Accepted && code/100 == 2:
			r.Outcome, r.QueueID = Accepted, queueID
		case code == 0 || code/100 == 2 || !mailed:
			open = append(open, to)
		case d.m.AllOrNothing || code == 421 || code/100 == 3:
			open = append(open, to)
		case r.says(tooManyRcpts, OpRcpt) && accepted > 0:
			open = append(open, to) // another transaction, at once
		default:
			refusal := &Error{Op: OpRcpt, subject: printable.Address(r.To), Reply: r.Reply, Outcome: NotAccepted}
			if d.c.cfg.Retry.Temporary && code/100 == 4 {
				open = append(open, to)
				wait = refusal
				continue
			}
			if d.refusal == nil {
				d.refusal = refusal
			}
		}
	}
	d.todo = d.todo[len(t.rcpts)-len(open):] // in place: there may be thousands, and a transaction for each
	copy(d.todo, open)
	if mailed && (tooMany > 0 || e == nil && d.rcpts.most > 0) {
		d.rcpts.took(len(t.rcpts), accepted, tooMany)
		if tooMany == 0 || accepted > 0 && number {
			d.c.cfg.profile.rcptsTaken(len(t.rcpts), accepted, tooMany)
		}
	}
	return wait
}

// pause waits before the next try if there is one, as what says. Else it returns e, the reason.
func (d *delivery) pause(what next, e *Error) *Error {
	if what == crowded {
		what = again
		if d.c.pool.open() > 1 {
			what = elsewhere // the others work, and whoever waits is served in turn
		}
	}
	if what == elsewhere {
		d.traceRetry(0, e)
		return nil
	}
	d.attempts++
	if what == stop || d.c.cfg.Retry.exhausted(d.attempts) {
		return e
	}
	wait := d.c.cfg.Retry.backoff(d.attempts)
	d.traceRetry(wait, e)
	if err := sleep(d.ctx, wait, d.c.pool.ending); err != nil {
		return &Error{Op: e.Op, subject: e.subject, Reply: e.Reply, Outcome: NotAccepted, Err: err}
	}
	return nil
}

func (d *delivery) traceRetry(wait time.Duration, e *Error) {
	if t := d.c.cfg.Trace; t != nil && t.Retry != nil {
		t.Retry(d.ctx, d.attempts, wait, e)
	}
}

// end makes the receipt and the error of the whole. Recipients still in d.todo share the fate that e tells.
func (d *delivery) end(e *Error) (Receipt, error) {
	if e != nil {
		for _, to := range d.todo {
			if r := &d.receipt.Recipients[to]; r.Code/100 < 4 || e.Op != OpRcpt && e.Code/100 >= 4 {
				r.Reply = e.Reply
			}
		}
	}
	some, whole := false, d.refusal == nil && d.unknown == nil
	var refused []RecipientError
	for _, r := range d.receipt.Recipients {
		if r.Outcome == Accepted {
			some = true
		} else {
			refused = append(refused, RecipientError{To: r.To, Reply: r.Reply, Outcome: r.Outcome})
		}
	}
	if len(refused) == 0 {
		return d.receipt, nil
	}
	switch {
	case d.unknown != nil:
		e = d.unknown
	case e == nil:
		e = d.refusal
	}
	if some || !whole || (d.m.AllOrNothing && e.Op == OpRcpt) {
		e.Refused = refused
	}
	switch {
	case d.unknown != nil:
		e.Outcome = Unknown
	case some:
		e.Outcome = Accepted
	default:
		e.Outcome = NotAccepted
	}
	e.Attempts = max(d.attempts, 1)
	return d.receipt, e
}

// verdict tells what became of the transaction; nil means that the message was accepted for the recipients that were.
func (t *transaction) verdict() *Error {
	s := t.s
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case t.finalIn && t.final.Class() == 2 && t.acceptedRcpts() > 0 && t.data.Class() < 4:
		return nil
	case t.finalIn && (t.final.Class() == 3 || t.final.Class() == 2 && t.agreedRcpts() > 0): // behind a refusal of MAIL or of a chunk
		return &Error{Op: t.endOp(), Reply: publicReply(t.final), Outcome: Unknown} // whatever it may mean
	}
	if t.dubiousLocked() {
		clear(t.rcpt)
		e := &Error{Op: OpData, Outcome: NotAccepted}
		e.blame(s.cause)
		return e
	}
	if e := t.refusalLocked(); e != nil && (t.finalIn || t.endAt == 0 || t.decidesLocked(e)) {
		e.Outcome = NotAccepted
		return e
	}
	switch {
	case t.finalIn:
		return &Error{Op: t.endOp(), Reply: publicReply(t.final), Outcome: NotAccepted}
	case t.endAt > 0 && (s.attempted >= t.endAt || s.cause == nil && s.writeErr == nil) && !t.behind421Locked():
		// On a session that works the dot may still be in the buffer, but it will leave.
		err := ended(t.ctx)
		if err == nil {
			err = lost(s.cause)
		}
		return &Error{Op: t.endOp(), Outcome: Unknown, Err: err}
	}
	e := &Error{Op: OpFinalDot, Outcome: NotAccepted}
	switch {
	case t.asked == 0:
		e.Op = OpWait
	case t.answered < t.asked:
		e.Op, e.subject = t.stepLocked()
	case t.endAt == 0:
		e.Op = OpBody
	}
	e.blame(s.cause)
	if t.bodyErr != nil {
		e.Op, e.Err = OpBody, t.bodyErr
		_, e.permanent = t.bodyErr.(*sizeError)
	}
	if err := ended(t.ctx); err != nil && (t.bodyErr == nil || t.cancelled) && e.Code == 0 {
		e.Err = err
	}
	return e
}

// blame makes the end of a session the reason for e.
func (e *Error) blame(cause error) {
	switch cause := cause.(type) {
	case *unexpectedReply:
		if cause.reply.Class() >= 4 { // the relay says why it does not take the body
			e.Reply = publicReply(cause.reply)
		} else {
			e.Err = cause
		}
	case *replyError: // to what another transaction had asked: only 421 is for all
		if e.Err = cause; cause.reply.Code == 421 {
			e.Err, e.Reply = nil, publicReply(cause.reply)
		}
	default:
		e.Err = lost(cause)
	}
}

// decidesLocked reports whether e, a refusal in the envelope, means that what was sent behind it is not accepted, although
// there is no reply to its end. That the relay refuses RSET says nothing of what stands behind, unless it leaves, nor does
// it when one recipient is refused and another one not, or MAIL is and a recipient not.
func (t *transaction) decidesLocked(e *Error) bool {
	switch e.Op {
	case OpRset:
		return e.Code == 421
	case OpMail, OpRcpt:
		// A relay that has said 421 and closed in order was leaving, and has taken nothing of what came behind.
		return t.agreedRcpts() == 0 || e.Code == 421 && t.s.leftInOrder
	}
	return true
}

// dubiousLocked reports whether the replies to an envelope behind a final dot may be those to other commands: a relay that
// throws away a part of what came with the dot is short of as many replies, until one side ends the connection.
func (t *transaction) dubiousLocked() bool {
	if !t.overlapped || t.endAt > 0 || t.s.cause == nil || t.rset.Class() != 2 {
		return false
	}
	_, ended := t.s.cause.(*replyError) // 421, or one that cannot be the reply to its command
	return ended || t.answered < t.asked && isTimeout(t.s.cause)
}

// behind421Locked reports whether the relay has said 421 to a transaction before t, and nothing more until the connection
// ended in order: replies come in order (RFC 2920, 3.2), so it was leaving when it came to t, and has taken nothing of it.
func (t *transaction) behind421Locked() bool {
	return t.s.said421 && t.answered == 0 && t.s.leftInOrder
}

// endOp is the step that ends the message.
func (t *transaction) endOp() Op {
	if t.byData {
		return OpFinalDot
	}
	return OpBdat
}

// lost says of err, a fault of the connection, what it means.
func lost(err error) error {
	if err == nil {
		return nil
	}
	if closedByPeer(err) {
		return fmt.Errorf("connection lost: %w", err)
	}
	return err
}

// refusalLocked is the relay's first refusal in the envelope: what it says later is a consequence, as is its hanging up.
func (t *transaction) refusalLocked() *Error {
	if t.authErr != nil {
		return t.authErr.clone()
	}
	if t.rset.Code != 0 && t.rset.Class() != 2 && t.mailed.Class() != 2 { // else it did no harm
		return &Error{Op: OpRset, Reply: publicReply(t.rset)}
	}
	if t.mailRefused() {
		return &Error{Op: OpMail, subject: printable.Address(t.m.From), Reply: publicReply(t.mailed)}
	}
	first, accepted, refused := -1, 0, 0
	for i, r := range t.rcpt {
		switch {
		case r.Class() == 2:
			accepted++
		case r.Code != 0:
			refused++
			if first < 0 || r.Code == 421 {
				first = i
			}
		}
	}
	if first >= 0 && (refused == len(t.rcpts) || t.m.AllOrNothing || t.rcpt[first].Code == 421) {
		return &Error{Op: OpRcpt, subject: printable.Address(t.m.To[t.rcpts[first]]), Reply: publicReply(t.rcpt[first])}
	}
	if t.data.Code != 0 && t.data.Class() > 3 {
		return &Error{Op: t.dataOp(), Reply: publicReply(t.data)}
	}
	return nil
}

// dataOp is the step that begins the message.
func (t *transaction) dataOp() Op {
	if op := t.endOp(); op != OpFinalDot {
		return op
	}
	return OpData
}

// stepLocked is the oldest command of the envelope that has no reply.
func (t *transaction) stepLocked() (Op, string) {
	s := t.s
	for _, x := range s.waiting[s.head:] {
		if x.tx == t {
			if x.op == OpRcpt {
				return x.op, printable.Address(t.m.To[t.rcpts[x.rcpt]])
			}
			if x.op == OpMail {
				return x.op, printable.Address(t.m.From)
			}
			return x.op, ""
		}
	}
	return OpMail, ""
}

// begin checks the message and fills in what the delivery needs to know of it.
func (d *delivery) begin() error {
	if err := ended(d.ctx); err != nil {
		return &Error{Op: OpCheck, Outcome: NotAccepted, Err: err}
	}
	if err := d.m.check(); err != nil {
		return &Error{Op: OpCheck, Outcome: NotAccepted, Err: err, permanent: true}
	}
	if d.m.MailOptions != nil {
		d.mail = *d.m.MailOptions
	}
	if !isASCII(d.m.From) {
		d.utf8 = d.m.From
	} else if i := slices.IndexFunc(d.m.To, func(to string) bool { return !isASCII(to) }); i >= 0 {
		d.utf8 = d.m.To[i]
	}
	d.size = canonicalSize(d.m)
	if len(d.m.To) > 1 {
		d.rcpts = d.c.cfg.profile.maxRcpts()
	}
	d.todo = make([]int, len(d.m.To))
	d.receipt.Recipients = make([]RecipientReceipt, len(d.m.To))
	for i, to := range d.m.To {
		d.todo[i] = i
		d.receipt.Recipients[i] = RecipientReceipt{To: to, Outcome: NotAccepted}
		if o := d.m.RcptOptions[to]; o != nil {
			if d.dsnFor == "" && (len(o.Notify) > 0 || o.OriginalRecipient != "") {
				d.dsnFor = to
			}
			if d.rrvsFor == "" && !o.RequireRecipientValidSince.IsZero() {
				d.rrvsFor = to
			}
		}
	}
	return nil
}

// canonicalSize is the size of a body that is known before it is written, or 0.
func canonicalSize(m *Message) int64 {
	if b, ok := m.Body.(bytesBody); ok {
		return wire.CanonicalSize(b)
	}
	return 0
}

// What is right and wrong: compares each Send's outcome with the relay's ledger.
package storm

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/smtprelay/smtprelay"
)

// stormTold is the result of one Send, and when it returned.
type stormTold struct {
	m            *stormMessage
	receipt      smtprelay.Receipt
	err          error
	viaSendMail  bool // no receipt
	together     bool // SendAll: how long it took depends on the reader of the results
	untold       bool // the loop over the results ended before this result
	began, ended time.Time
	gaveUp       time.Time // when the context ended; zero means not before Send returned
	closing      bool      // Close or Shutdown was called before it ended
	closed       bool      // Close or Shutdown had returned before it began
}

// stormJudge compares the results with the relay's ledger.
type stormJudge struct {
	p        *stormPlan
	relay    *stormRelay
	problems []string
}

func (j *stormJudge) fail(told *stormTold, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if told != nil {
		text = fmt.Sprintf("message %d: %s", told.m.id, text)
	}
	j.problems = append(j.problems, text)
}

// judge judges one message. The relay must have finished.
func (j *stormJudge) judge(told *stormTold) {
	attempts := j.relay.attempts[told.m.id]
	copies := map[string][]*stormAttempt{} // by recipient
	for _, a := range attempts {
		if !a.taken {
			continue
		}
		if a.problem != "" {
			j.fail(told, "the relay has accepted a wrong message: %s", a.problem)
		}
		for _, r := range a.rcpts {
			if r.accepted {
				copies[r.to] = append(copies[r.to], a)
			}
		}
	}
	for to, as := range copies {
		if len(as) > 1 {
			j.fail(told, "%s has %d copies", to, len(as))
		}
		if !slices.Contains(told.m.to, to) {
			j.fail(told, "%s was never a recipient", to)
		}
	}
	j.repeated(told, attempts)
	if told.untold {
		return
	}
	outcomes := j.outcomes(told)
	if outcomes == nil {
		return // reported already
	}
	accepted := 0
	for i, to := range told.m.to {
		switch n := len(copies[to]); {
		case outcomes[i] == smtprelay.Accepted && n == 0:
			j.fail(told, "%s was reported as accepted, but the relay has nothing", to)
		case outcomes[i] == smtprelay.NotAccepted && n > 0:
			j.fail(told, "%s was reported as not accepted, but the relay has it", to)
		}
		if outcomes[i] == smtprelay.Accepted {
			accepted++
		}
	}
	if told.m.all && accepted > 0 && accepted < len(told.m.to) {
		j.fail(told, "AllOrNothing, but accepted for %d of %d", accepted, len(told.m.to))
	}
	j.justified(told, outcomes, attempts)
	j.replies(told, outcomes, copies)
	if j.p.weather.calm() {
		j.served(told, outcomes, attempts)
	}
	// A Send whose first write carries another message's end ignores its context until that write is done, which is at once if
	// the relay reads.
	reads := !j.p.weather.chunking && !slices.ContainsFunc(j.p.weather.faults, func(f stormFault) bool { return f == stall || f == drip })
	if reads && !told.gaveUp.IsZero() && !told.together && told.ended.Sub(told.gaveUp) > 2*time.Second {
		j.fail(told, "Send returned %v after its context had ended", told.ended.Sub(told.gaveUp))
	}
	if told.closed && (told.err == nil || !errors.Is(told.err, smtprelay.ErrClosed)) {
		j.fail(told, "sent on a closed client, result: %v", told.err)
	}
}

// dotted reports whether the client has written the final dot. Over TLS this is known only if the relay has read it.
func (a *stormAttempt) dotted() bool { return a.dotRead || a.sent != nil && a.sent.dot.Load() > 0 }

// refused reports whether the relay has reliably said that it has not accepted the message: in reply to the final dot or to a
// chunk, or with 421 to everything outstanding.
func (a *stormAttempt) refused() bool {
	return a.failed || a.answered && a.final.code/100 != 2 || !a.dotRead && a.conn.leaving
}

func (a *stormAttempt) carries(to string) bool {
	return slices.ContainsFunc(a.rcpts, func(r stormRcpt) bool { return r.to == to && r.accepted })
}

// repeated finds a message that was sent again although the relay may have accepted it.
func (j *stormJudge) repeated(told *stormTold, attempts []*stormAttempt) {
	for _, a := range attempts {
		if !a.dotted() || a.refused() || a.sent == nil {
			continue
		}
		for _, again := range attempts {
			if again == a || again.sent == nil || again.sent.mail < a.sent.dot.Load() {
				continue
			}
			for _, r := range again.rcpts {
				if a.carries(r.to) {
					j.fail(told, "%s was sent again on connection %d although connection %d may have taken it", r.to, again.conn.n, a.conn.n)
				}
			}
		}
	}
}

// again checks what e says about sending again.
func (j *stormJudge) again(told *stormTold, e *smtprelay.Error) {
	to := smtprelay.RetryTo(told.err)
	for _, r := range e.Recipients {
		if slices.Contains(to, r.To) && r.Outcome != smtprelay.NotAccepted {
			j.fail(told, "RetryTo names %s, whose outcome is %v", r.To, r.Outcome)
		}
	}
	if should := smtprelay.ShouldRetry(told.err); e.Outcome != smtprelay.NotAccepted && (should || e.Temporary()) {
		j.fail(told, "outcome %v, but ShouldRetry %t, temporary %t", e.Outcome, should, e.Temporary())
	} else if e.Outcome == smtprelay.NotAccepted && should != (len(to) > 0) {
		j.fail(told, "ShouldRetry %t, but RetryTo %v", should, to)
	}
	if e.Scope == smtprelay.ScopeUnknown {
		j.fail(told, "the scope is unknown: %v", e)
	}
}

// outcomes returns the reported outcome of each recipient, and finds contradictions between the reports.
func (j *stormJudge) outcomes(told *stormTold) []smtprelay.Outcome {
	m := told.m
	all := func(o smtprelay.Outcome) []smtprelay.Outcome { return slices.Repeat([]smtprelay.Outcome{o}, len(m.to)) }
	if told.err == nil && told.viaSendMail {
		return all(smtprelay.Accepted)
	}
	e, ok := errors.AsType[*smtprelay.Error](told.err)
	if told.err != nil && !ok {
		j.fail(told, "the error is a %T: %v", told.err, told.err)
		return nil
	}
	var byReceipt []smtprelay.Outcome
	if rs := told.receipt.Recipients; len(rs) > 0 {
		for i, r := range rs {
			if len(rs) != len(m.to) || r.To != m.to[i] {
				j.fail(told, "the receipt is for %v, but the message was to %v", rs, m.to)
				return nil
			}
			byReceipt = append(byReceipt, r.Outcome)
		}
	}
	if told.err == nil {
		if !slices.Equal(byReceipt, all(smtprelay.Accepted)) {
			j.fail(told, "no error, but a receipt that says %v", byReceipt)
		}
		return all(smtprelay.Accepted)
	}
	if strings.Contains(fmt.Sprintf("%v %+v %#v", told.err, told.err, e), stormPassword) {
		j.fail(told, "the error shows the password")
	}
	if smtprelay.OutcomeOf(told.err) != e.Outcome {
		j.fail(told, "OutcomeOf differs from the outcome %v", e.Outcome)
	}
	var byError []smtprelay.Outcome
	for i, r := range e.Recipients {
		if len(e.Recipients) != len(m.to) || r.To != m.to[i] {
			j.fail(told, "the error is for %v, but the message was to %v", e.Recipients, m.to)
			return nil
		}
		byError = append(byError, r.Outcome)
	}
	j.again(told, e)
	switch e.Outcome {
	case smtprelay.Accepted:
		if !slices.Contains(byError, smtprelay.NotAccepted) {
			j.fail(told, "an error that says accepted but names no recipient: %v", e)
		}
		if !told.viaSendMail && byReceipt == nil {
			j.fail(told, "accepted for some, but no receipt: %v", e)
		}
	case smtprelay.NotAccepted:
		if !slices.Equal(byError, all(smtprelay.NotAccepted)) {
			j.fail(told, "not accepted, but by recipient %v", byError)
		}
	case smtprelay.Unknown:
		if !slices.Contains(byError, smtprelay.Unknown) {
			j.fail(told, "unknown, but by recipient %v", byError)
		}
	}
	if byReceipt != nil && !slices.Equal(byReceipt, byError) {
		j.fail(told, "the receipt says %v, but the error %v", byReceipt, byError)
	}
	return byError
}

// justified finds an outcome of unknown without reason, and one of not accepted where it should be unknown.
func (j *stormJudge) justified(told *stormTold, outcomes []smtprelay.Outcome, attempts []*stormAttempt) {
	for i, to := range told.m.to {
		dotted := j.relay.unread(told.m.id)
		clear := !dotted // each final dot had a reply that must have arrived
		for _, a := range attempts {
			// In chunks the message is sent before it is known which recipients are accepted.
			if !a.carries(to) && !j.p.weather.chunking {
				continue
			}
			// A caller that gives up while another Send, or a Ping, carries its final dot cannot know whether the dot will be
			// sent.
			carried := !told.gaveUp.IsZero() && a.sent != nil && (a.sent.carried.Load() || a.data == 354 && j.p.pings > 0)
			mayBe := a.dotted() || a.sent != nil && a.sent.perhaps.Load() || a.sent == nil && a.data == 354 || carried
			dotted = dotted || mayBe
			clear = clear && (!mayBe || a.answered && a.conn.faults == 0)
			if outcomes[i] == smtprelay.NotAccepted && a.carries(to) && a.dotted() && !a.answered && !a.refused() {
				j.fail(told, "%s was reported as not accepted although connection %d has not answered the final dot", to, a.conn.n)
			}
		}
		if outcomes[i] != smtprelay.Unknown {
			continue
		}
		if j.p.weather.chunking && (j.p.weather.tls || !told.gaveUp.IsZero()) {
			continue // a whole message may be in flight in one write, with another message's last chunk, before the relay reads it
		}
		if !dotted {
			j.fail(told, "%s is unknown although no final dot was written: %v", to, told.err)
		}
		if clear && told.gaveUp.IsZero() && !told.closing && j.p.weather.leaves == leavesPolitely {
			j.fail(told, "%s is unknown although the relay has answered: %v", to, told.err)
		}
	}
}

// unread reports whether the client has written a final dot of the message on a connection where the relay has not even read its
// MAIL.
func (r *stormRelay) unread(msg int) bool {
	return slices.ContainsFunc(r.conns, func(c *stormConn) bool {
		return slices.ContainsFunc(c.client.sendings[msg], func(s *stormSending) bool { return s.dot.Load() > 0 })
	})
}

// saysWhose finds the message that a refusal names.
var saysWhose = regexp.MustCompile(`of message (\d+)$`)

// replies compares the reported replies with the replies sent.
func (j *stormJudge) replies(told *stormTold, outcomes []smtprelay.Outcome, copies map[string][]*stormAttempt) {
	refused := func(to string, r smtprelay.Reply) {
		if r.Code == 0 {
			return
		}
		said := stormUnderstood(r)
		if said.text == "" && j.relay.saidCode(said.code) {
			return // others may report the code, not the text
		}
		if !j.relay.said[said] {
			if !j.relay.garbled(said) {
				j.fail(told, "%s: the relay has never said %v", to, said)
			}
			return
		}
		if said.code == 421 {
			return // this is about everything on the connection
		}
		if of := saysWhose.FindStringSubmatch(said.text); of != nil && of[1] != strconv.Itoa(told.m.id) {
			j.fail(told, "%s got the reply %s", to, of[0])
		}
		if whose := stormID(said.text); whose >= 0 && whose != told.m.id {
			j.fail(told, "%s got the reply to message %d: %v", to, whose, said)
		}
	}
	if e, ok := errors.AsType[*smtprelay.Error](told.err); ok {
		refused("the error", e.Reply)
		for _, r := range e.Recipients {
			if r.Outcome == smtprelay.Accepted {
				continue
			}
			refused(r.To, r.Reply)
		}
	}
	if told.viaSendMail {
		return
	}
	var last []*stormAttempt // the accepted ones
	for i, r := range told.receipt.Recipients {
		if outcomes[i] != smtprelay.Accepted {
			refused(r.To, r.Reply)
			continue
		}
		if len(copies[r.To]) != 1 {
			continue // reported already
		}
		a := copies[r.To][0]
		last = append(last, a)
		for _, was := range a.rcpts {
			if was.to == r.To && stormUnderstood(r.Reply) != was.said && !a.conn.confused {
				j.fail(told, "the reply to %s was %v, the receipt says %v", r.To, was.said, r.Reply)
			}
		}
		if a.answered && r.QueueID != a.queueID {
			j.fail(told, "%s was queued as %s, the receipt says %q", r.To, a.queueID, r.QueueID)
		}
	}
	ofThat := func(a *stormAttempt) bool {
		return !a.answered || stormUnderstood(told.receipt.Reply) == a.final && told.receipt.QueueID == a.queueID
	}
	if len(last) > 0 && !slices.ContainsFunc(last, ofThat) {
		j.fail(told, "the receipt says %v, queued as %q, which is the reply to none of its transactions", told.receipt.Reply, told.receipt.QueueID)
	}
}

// saidCode reports whether the relay has sent a reply with this code.
func (r *stormRelay) saidCode(code int) bool {
	for said := range r.said {
		if said.code == code {
			return true
		}
	}
	return false
}

// garbled reports whether a reply may come from a fault that sends arbitrary text.
func (r *stormRelay) garbled(said stormSaid) bool {
	return r.faults[garbage]+r.faults[longLine]+r.faults[manyLines] > 0
}

var enhancedCode = regexp.MustCompile(`(?m)^[245]\.\d\.\d+ `)

// stormUnderstood removes the enhanced codes from the lines that have kept them.
func stormUnderstood(r smtprelay.Reply) stormSaid {
	return stormSaid{r.Code, enhancedCode.ReplaceAllString(r.Message, "")}
}

// served checks in calm weather that every message whose caller did not give up was accepted as far as the relay accepts.
func (j *stormJudge) served(told *stormTold, outcomes []smtprelay.Outcome, attempts []*stormAttempt) {
	m := told.m
	if told.closing {
		return
	}
	if !told.gaveUp.IsZero() {
		e, ok := errors.AsType[*smtprelay.Error](told.err)
		if ok && e.Reply.Code == 0 && e.Op != smtprelay.OpCheck && m.sound() && m.kind != bodyReader && !errors.Is(e, context.Canceled) && !errors.Is(e, context.DeadlineExceeded) {
			j.fail(told, "its context has ended, but the result is %v", e)
		}
		return
	}
	refused := 0
	want := make([]smtprelay.Outcome, len(m.to))
	for i, to := range m.to {
		want[i] = smtprelay.Accepted
		if strings.HasPrefix(to, "gone") || strings.HasPrefix(to, "grey") && !j.patient(m) {
			want[i] = smtprelay.NotAccepted
			refused++
		}
	}
	if !m.sound() || m.all && refused > 0 {
		want = slices.Repeat([]smtprelay.Outcome{smtprelay.NotAccepted}, len(m.to))
	}
	if m.all && j.split(len(m.to)) {
		return // what needs several transactions cannot be all or nothing
	}
	if (m.kind == bodyReader || m.kind == bodyBadInput) && (j.split(len(m.to)) || j.patient(m)) {
		return // it can be read only once: it is refused before it is read, or sent to some
	}
	if !slices.Equal(outcomes, want) {
		j.fail(told, "in calm weather the outcome is %v, not %v: %v", outcomes, want, told.err)
	}
	if told.err != nil && !m.sound() && m.kind != bodyNothing && refused == 0 && !errors.Is(told.err, errStormBody) {
		j.fail(told, "its body has failed, but the result is %v", told.err)
	}
}

// patient reports whether a recipient that is temporarily refused twice is tried often enough.
func (j *stormJudge) patient(m *stormMessage) bool { return j.p.config.Retry.On4xx }

// split reports whether n recipients need several transactions.
func (j *stormJudge) split(n int) bool {
	w := &j.p.weather
	most := least(w.maxRcpts(false), w.rcptCap)
	return most > 0 && n > most
}

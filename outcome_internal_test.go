package smtprelay

// What the end of a transaction means for its message and each recipient: each row is a Result and its meaning according to the
// RFC or known relays.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/textproto"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/emersion/go-smtp"

	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// code is a reply with only a code; 0 means no reply.
func code(n int) wire.Reply { return wire.Reply{Code: n} }

// codes returns replies to RCPT.
func codes(n ...int) (replies []wire.Reply) {
	for _, c := range n {
		replies = append(replies, code(c))
	}
	return replies
}

// replies returns the replies to MAIL, DATA and the final dot, and to each RCPT.
func replies(mail, data, final int, rcpt ...int) conn.Replies {
	return conn.Replies{Mail: code(mail), Rcpt: codes(rcpt...), Data: code(data), Final: code(final)}
}

func TestResultDecidesTheOutcome(t *testing.T) {
	var (
		eof     = io.EOF
		timeout = error(&conn.TimeoutError{Step: conn.StepMail})
		gone421 = error(&conn.ReplyError{Step: conn.StepRset, Reply: code(421)})
		body    = errors.New("disk failed")
	)
	for _, tt := range []struct {
		why  string
		r    conn.Result
		all  bool   // AllOrNothing
		want string // outcome, step and code; "" for accepted
	}{
		// RFC 5321, 4.2.5: the reply to the final dot decides.
		{"2xx to the final dot: the relay is responsible", conn.Result{Replies: replies(250, 354, 250, 250), End: conn.EndSent}, false, ""},
		{"with some recipients: for those", conn.Result{Replies: replies(250, 354, 250, 250, 550), End: conn.EndSent}, false, ""},
		{"what happens to the connection later does not matter", conn.Result{Replies: replies(250, 354, 250, 250), End: conn.EndSent, Lost: eof, CtxErr: context.Canceled}, false, ""},
		{"4xx to the final dot", conn.Result{Replies: replies(250, 354, 451, 250), End: conn.EndSent}, false, "not accepted: end 451"},
		{"5xx to the final dot", conn.Result{Replies: replies(250, 354, 554, 250), End: conn.EndSent}, false, "not accepted: end 554"},
		{"421 to the final dot (3.8)", conn.Result{Replies: replies(250, 354, 421, 250), End: conn.EndSent, Lost: gone421}, false, "not accepted: end 421"},
		{"3xx to the final dot has no meaning", conn.Result{Replies: replies(250, 354, 354, 250), End: conn.EndSent}, false, "unknown: end 354"},
		{"in chunks the last BDAT decides (RFC 3030, 2)", conn.Result{Replies: replies(250, 250, 552, 250), End: conn.EndSent, Chunked: true}, false, "not accepted: end 552"},

		// RFC 1047: without that reply the outcome is unknown.
		{"lost after the final dot", conn.Result{Replies: replies(250, 354, 0, 250), End: conn.EndSent, Begun: true, Lost: eof}, false, "unknown: end"},
		{"no reply in time", conn.Result{Replies: replies(250, 354, 0, 250), End: conn.EndSent, Begun: true, Lost: timeout}, false, "unknown: end"},
		{"the caller gave up, the dot was sent", conn.Result{Replies: replies(250, 354, 0, 250), End: conn.EndSent, CtxErr: context.Canceled}, false, "unknown: end"},
		{"the caller gave up, the dot will be sent", conn.Result{Replies: replies(250, 354, 0, 250), End: conn.EndDue, CtxErr: context.Canceled}, false, "unknown: end"},
		{"in chunks, without any reply", conn.Result{Replies: replies(0, 0, 0, 0), End: conn.EndSent, Chunked: true, Begun: true, Waiting: conn.StepMail, Lost: eof}, false, "unknown: end"},

		// Before the end is sent the relay has no message.
		{"the dot was buffered but not sent", conn.Result{Replies: replies(250, 354, 0, 250), End: conn.EndUnsent, Begun: true, Lost: eof}, false, "not accepted: end"},
		{"lost within the body", conn.Result{Replies: replies(250, 354, 0, 250), Begun: true, Lost: eof}, false, "not accepted: body"},
		{"the body failed", conn.Result{Replies: replies(250, 354, 0, 250), Begun: true, BodyErr: body, Lost: errors.New("given up")}, false, "not accepted: body"},
		{"lost at the envelope", conn.Result{Replies: replies(250, 0, 0, 0), Begun: true, Waiting: conn.StepRcpt, Lost: eof}, false, "not accepted: rcpt"},
		{"lost before any reply", conn.Result{Replies: replies(0, 0, 0, 0), Lost: eof}, false, "not accepted: wait"},
		{"the relay says why it refuses the body before it closes", conn.Result{Replies: replies(250, 354, 0, 250), Begun: true, Lost: &conn.UnexpectedReply{Reply: code(552)}}, false, "not accepted: body 552"},
		{"an extra reply that refuses nothing is no reason", conn.Result{Replies: replies(250, 354, 0, 250), Begun: true, Lost: &conn.UnexpectedReply{Reply: code(250)}}, false, "not accepted: body"},
		{"421 to another message is for all messages", conn.Result{Replies: replies(0, 0, 0, 0), Begun: true, Waiting: conn.StepMail, Lost: gone421}, false, "not accepted: mail 421"},
		{"an impossible reply to another message is not for this one", conn.Result{Replies: replies(0, 0, 0, 0), Begun: true, Waiting: conn.StepMail, Lost: &conn.ReplyError{Step: conn.StepFinalDot, Reply: code(354)}}, false, "not accepted: mail"},

		// The first refusal is the reason.
		{"MAIL refused", conn.Result{Replies: replies(550, 503, 0, 503), Begun: true}, false, "not accepted: mail 550"},
		{"the only recipient refused, and so DATA", conn.Result{Replies: replies(250, 554, 0, 550), Begun: true}, false, "not accepted: rcpt 550"},
		{"one of two refused, and DATA for another reason", conn.Result{Replies: replies(250, 451, 0, 250, 550), Begun: true}, false, "not accepted: data 451"},
		{"one of two refused for all or nothing", conn.Result{Replies: replies(250, 0, 0, 250, 452), Begun: true}, true, "not accepted: rcpt 452"},
		{"421 to one recipient is for all recipients (RFC 5321, 3.8)", conn.Result{Replies: replies(250, 0, 0, 250, 421), Begun: true, Lost: gone421}, false, "not accepted: rcpt 421"},
		{"AUTH refused ahead of the envelope", conn.Result{Replies: conn.Replies{Auth: code(535), Mail: code(530), Rcpt: codes(503)}, Begun: true}, false, "not accepted: auth 535"},
		{"RSET refused, the rest accepted: no harm", conn.Result{Replies: conn.Replies{Rset: code(500), Mail: code(250), Rcpt: codes(250), Final: code(250)}, End: conn.EndSent}, false, ""},
		{"RSET refused, and the commands after it", conn.Result{Replies: conn.Replies{Rset: code(503), Mail: code(503), Rcpt: codes(503)}, Begun: true}, false, "not accepted: rset 503"},

		// The wrong envelope.
		{"MAIL refused, a recipient accepted, the message too: for whom?", conn.Result{Replies: replies(503, 354, 250, 250), End: conn.EndSent}, false, "unknown: end 250"},
		{"a chunk refused, its end accepted", conn.Result{Replies: replies(250, 552, 250, 250), End: conn.EndSent, Chunked: true}, false, "unknown: end 250"},
		{"MAIL refused, a recipient accepted, no reply to the end", conn.Result{Replies: replies(503, 0, 0, 250), End: conn.EndSent, Chunked: true, Lost: eof}, false, "unknown: end"},
		{"all refused: the end cannot have been accepted", conn.Result{Replies: replies(503, 0, 0, 503), End: conn.EndSent, Chunked: true, Lost: eof}, false, "not accepted: mail 503"},

		// Replies come in order (RFC 2920, 3.2).
		{"an earlier 421, then a FIN: nothing was accepted", conn.Result{Replies: replies(0, 0, 0, 0), End: conn.EndSent, Chunked: true, Begun: true, Waiting: conn.StepMail, Lost: gone421, Left421: true}, false, "not accepted: mail 421"},
		{"an earlier 421, then a reset: replies may be missing", conn.Result{Replies: replies(0, 0, 0, 0), End: conn.EndSent, Chunked: true, Begun: true, Waiting: conn.StepMail, Lost: gone421}, false, "unknown: end"},
		{"with a reply to this message in between", conn.Result{Replies: replies(250, 0, 0, 0), End: conn.EndSent, Chunked: true, Begun: true, Waiting: conn.StepRcpt, Lost: gone421, Left421: true}, false, "unknown: end"},
		{"421 to its RCPT, another accepted, then a FIN", conn.Result{Replies: replies(250, 0, 0, 250, 421), End: conn.EndSent, Chunked: true, Lost: gone421, Left421: true}, false, "not accepted: rcpt 421"},
		{"the same, then a reset", conn.Result{Replies: replies(250, 0, 0, 250, 421), End: conn.EndSent, Chunked: true, Lost: gone421}, false, "unknown: end"},

		// Commands after a final dot may have been discarded.
		{"missing replies after a final dot", conn.Result{Replies: conn.Replies{Rset: code(250), Mail: code(250), Rcpt: codes(550)}, Overlapped: true, Begun: true, Waiting: conn.StepData, Lost: timeout}, false, "not accepted: data"},
		{"the same without overlap: the reply is RCPT's", conn.Result{Replies: conn.Replies{Rset: code(250), Mail: code(250), Rcpt: codes(550)}, Begun: true, Waiting: conn.StepData, Lost: timeout}, false, "not accepted: rcpt 550"},

		{"the caller gave up before the end", conn.Result{Replies: replies(250, 0, 0, 0), Begun: true, Waiting: conn.StepRcpt, CtxErr: context.Canceled, Cancelled: true, Lost: eof}, false, "not accepted: rcpt"},
	} {
		m := &Message{From: "a@x.example", To: []string{"b@y.example", "c@y.example"}, AllOrNothing: tt.all}
		rcpts := []int{0, 1}[:len(tt.r.Rcpt)]
		got := ""
		if e := verdict(m, rcpts, &tt.r); e != nil {
			got = strings.TrimSuffix(e.Outcome.String()+": "+string(e.Op)+" "+e.Reply.String(), " 0")
		}
		if got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.why, got, tt.want)
		}
	}
}

func TestErrorNamesTheCause(t *testing.T) {
	body := errors.New("disk failed")
	for _, tt := range []struct {
		why  string
		r    conn.Result
		want error
	}{
		{"the body's error, although the caller gave up later", conn.Result{BodyErr: body, CtxErr: context.Canceled, Begun: true}, body},
		{"the context's, if it ended the connection during the body", conn.Result{BodyErr: body, CtxErr: context.Canceled, Cancelled: true, Begun: true}, context.Canceled},
		{"the context's before the connection's", conn.Result{CtxErr: context.DeadlineExceeded, Lost: io.EOF, Begun: true}, context.DeadlineExceeded},
		{"the context's after the final dot", conn.Result{CtxErr: context.DeadlineExceeded, Lost: io.EOF, End: conn.EndSent}, context.DeadlineExceeded},
		{"the connection's", conn.Result{Lost: io.EOF, Begun: true}, io.EOF},
	} {
		tt.r.Replies = replies(250, 354, 0, 250)
		if e := verdict(&Message{To: []string{"b@y.example"}}, []int{0}, &tt.r); e == nil || !errors.Is(e, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.why, e, tt.want)
		}
	}
	e := verdict(&Message{To: []string{"b@y.example"}}, []int{0}, &conn.Result{Replies: replies(250, 354, 0, 250), BodyErr: &conn.SizeError{Limit: 9}})
	if e.Temporary() {
		t.Errorf("%v: temporary, want permanent: it is as large the next time", e)
	}
}

func TestEachRecipientHasAnOutcome(t *testing.T) {
	accepted, unknown, failed := (*Error)(nil), &Error{Outcome: Unknown}, &Error{Outcome: NotAccepted}
	for _, tt := range []struct {
		why       string
		mail      int
		rcpt      []int // the first one's outcome is tested
		e         *Error
		all       bool
		temporary bool // Retry.On4xx
		want      fate
	}{
		{"accepted with the message", 250, []int{250}, accepted, false, false, fateAccepted},
		{"251 will forward (RFC 5321, 3.4)", 250, []int{251}, accepted, false, false, fateAccepted},
		{"refused, while others got it", 250, []int{550, 250}, accepted, false, false, fateRefused},
		{"refused temporarily: the caller decides how long to wait", 250, []int{450, 250}, accepted, false, false, fateRefused},
		{"refused temporarily, with On4xx", 250, []int{450, 250}, accepted, false, true, fateLater},
		{"too many recipients: the next transaction (4.5.3.1.10)", 250, []int{452, 250}, accepted, false, false, fateOpen},
		{"552 instead of 452, as from older relays", 250, []int{552, 250}, accepted, false, false, fateOpen},
		{"452 to all of them: not their number but the relay", 250, []int{452, 452}, failed, false, false, fateRefused},
		{"the final dot's reply is missing", 250, []int{250}, unknown, false, false, fateUnknown},
		{"in chunks, RCPT's reply is missing too", 250, []int{0}, unknown, false, false, fateUnknown},
		{"refused before the connection was lost", 250, []int{550, 250}, unknown, false, false, fateRefused},
		{"the message failed, the recipient was accepted", 250, []int{250}, failed, false, false, fateOpen},
		{"MAIL failed: RCPT's refusal is a consequence", 451, []int{503}, failed, false, false, fateOpen},
		{"421 is about the connection (3.8)", 250, []int{421}, failed, false, false, fateOpen},
		{"an impossible reply to RCPT", 250, []int{354}, failed, false, false, fateOpen},
		{"all or nothing: refused with the message, not alone", 250, []int{550, 250}, failed, true, false, fateOpen},
	} {
		r := &conn.Result{Replies: replies(tt.mail, 0, 0, tt.rcpt...)}
		if got := fateOf(&Message{AllOrNothing: tt.all}, r, 0, tt.e, tt.temporary, false); got != tt.want {
			t.Errorf("%s: got %d, want %d", tt.why, got, tt.want)
		}
	}
}

func TestTooManyRecipientsNeedsAReplyThatSaysSo(t *testing.T) {
	full := wire.Reply{Code: 452, Enhanced: [3]int{4, 2, 2}, Text: "mailbox full"}
	number := wire.Reply{Code: 452, Enhanced: [3]int{4, 5, 3}}
	for _, tt := range []struct {
		why     string
		rcpt    []wire.Reply
		tooMany int
		sure    bool
	}{
		{"none", codes(250, 250), 0, true},
		{"the last ones, explicitly", []wire.Reply{code(250), number, number}, 2, true},
		{"a mailbox that is full", []wire.Reply{code(250), full}, 1, false},
		{"452 alone, at the end of several", codes(250, 250, 452), 1, true},
		{"452 alone, of two: it may be the mailbox", codes(250, 452), 1, false},
		{"one accepted after it: not their number", codes(250, 452, 250), 1, false},
	} {
		tooMany, sure := countTooMany(&conn.Result{Replies: conn.Replies{Rcpt: tt.rcpt}})
		if tooMany != tt.tooMany || sure != tt.sure {
			t.Errorf("%s: got %d, %v, want %d, %v", tt.why, tooMany, sure, tt.tooMany, tt.sure)
		}
	}
}

// wireReply is a reply with an enhanced code.
func wireReply(code int, enhanced ...int) wire.Reply {
	return wire.Reply{Code: code, Enhanced: [3]int(enhanced)}
}

// The decision after a transaction that ended in an error.

func TestResultDecidesTheNextStep(t *testing.T) {
	first := func(r conn.Result) conn.Result { r.Seq, r.Used, r.Begun = 1, 1, true; return r }
	later := func(r conn.Result) conn.Result { r.Seq, r.Used, r.Begun = 2, 2, true; return r }
	refused := func(op Op, code int) Error { return Error{Op: op, Outcome: NotAccepted, Reply: Reply{Code: code}} }
	lost := func(op Op) Error { return Error{Op: op, Outcome: NotAccepted, Err: io.EOF} }
	mail250 := conn.Result{Replies: replies(250, 0, 0, 0)}
	for _, tt := range []struct {
		why       string
		r         conn.Result
		e         Error
		temporary bool // Retry.On4xx
		want      next
	}{
		{"unknown: sending again may deliver twice (RFC 1047)", first(mail250), Error{Op: OpEnd, Outcome: Unknown, Err: io.EOF}, true, giveUp},
		{"the caller gave up", first(conn.Result{CtxErr: context.Canceled}), lost(OpMail), true, giveUp},
		{"the body cannot be written", first(conn.Result{BodyErr: errors.New("disk failed")}), lost(OpBody), true, giveUp},

		{"connection lost: nothing was accepted", first(mail250), lost(OpBody), false, retryLater},
		{"lost before any reply, on a new connection", conn.Result{}, lost(OpWait), false, retryLater},
		{"lost before any reply, on a used connection: it was idle", conn.Result{Used: 2}, lost(OpWait), false, retryNow},
		{"lost before the reply to MAIL, on a used connection", later(conn.Result{}), lost(OpMail), false, retryNow},
		{"lost after the reply to MAIL: an attempt", later(mail250), lost(OpRcpt), false, retryLater},
		{"421 instead of MAIL's reply, on a used connection (RFC 5321, 3.8)", later(conn.Result{}), refused(OpMail, 421), false, retryNow},
		{"421 to the first message", first(conn.Result{}), refused(OpMail, 421), false, retryLater},
		{"Gmail has ended the idle connection", later(conn.Result{Replies: conn.Replies{Mail: wireReply(451, 4, 4, 2)}}), refused(OpMail, 451), false, retryNow},
		{"OpenSMTPD asks for another connection", later(conn.Result{Replies: conn.Replies{Mail: wireReply(452, 4, 5, 3)}}), refused(OpMail, 452), false, retryNow},
		{"but not for the first message", first(conn.Result{Replies: conn.Replies{Mail: wireReply(452, 4, 5, 3)}}), refused(OpMail, 452), false, giveUp},

		{"Microsoft 365: too many connections", first(mail250), refused(OpEnd, 432), false, waitForSlot},
		{"AUTH refused with commands pipelined after it: sent alone from now on", first(conn.Result{LedByAuth: true}), refused(OpAuth, 535), false, retryNow},
		{"hung up at AUTH with commands pipelined after it", first(conn.Result{LedByAuth: true}), lost(OpAuth), false, retryNow},
		{"hung up after AUTH", first(conn.Result{LedByAuth: true, Replies: conn.Replies{Auth: code(235)}}), lost(OpMail), false, retryNow},
		{"MAIL refused after AUTH", first(conn.Result{LedByAuth: true, Replies: conn.Replies{Auth: code(235), Mail: code(550)}}), refused(OpMail, 550), false, retryNow},
		{"a recipient refused after both is refused", first(conn.Result{LedByAuth: true, Replies: replies(250, 0, 0, 0)}), refused(OpRcpt, 550), false, giveUp},

		{"Amazon SES: messages come too fast", first(mail250), Error{Op: OpEnd, Outcome: NotAccepted, Reply: Reply{Code: 454, Message: "Throttling failure: Maximum sending rate exceeded."}}, false, waitForPace},
		{"Amazon SES: daily quota", first(mail250), Error{Op: OpEnd, Outcome: NotAccepted, Reply: Reply{Code: 454, Message: "Throttling failure: Daily message quota exceeded."}}, false, giveUp},
		{"4xx to MAIL on a used connection: it may be about the connection", later(conn.Result{Worked: true, Replies: conn.Replies{Mail: code(451)}}), refused(OpMail, 451), false, tryElsewhere},
		{"4xx to MAIL on a connection that accepted nothing", later(conn.Result{Replies: conn.Replies{Mail: code(451)}}), refused(OpMail, 451), false, giveUp},
		{"4xx to the first MAIL is not", first(conn.Result{Replies: conn.Replies{Mail: code(451)}}), refused(OpMail, 451), false, giveUp},
		{"the login is forgotten (RFC 4954, 6)", later(conn.Result{Replies: conn.Replies{Mail: code(530)}}), refused(OpMail, 530), false, tryElsewhere},

		{"RSET refused after a final dot: no more overlap", later(conn.Result{Overlapped: true, Replies: conn.Replies{Mail: code(250)}}), refused(OpRset, 503), false, retryNow},
		{"RSET refused: the message was not offered yet", later(mail250), refused(OpRset, 500), false, retryNow},
		{"an impossible reply after a final dot", later(conn.Result{Overlapped: true, Replies: conn.Replies{Mail: code(250)}}), refused(OpData, 250), false, retryNow},
		{"an impossible reply", first(mail250), refused(OpData, 250), false, retryLater},
		{"503 to MAIL: the relay is out of step", later(conn.Result{Replies: conn.Replies{Mail: code(503)}}), refused(OpMail, 503), false, tryElsewhere},
		{"503 to the first MAIL is permanent", first(conn.Result{Replies: conn.Replies{Mail: code(503)}}), refused(OpMail, 503), false, giveUp},

		{"4xx: the caller decides how long to wait", first(mail250), refused(OpEnd, 451), false, giveUp},
		{"4xx, with On4xx", first(mail250), refused(OpEnd, 451), true, retryLater},
		{"5xx", first(mail250), refused(OpEnd, 554), true, giveUp},
	} {
		if got := (Retry{On4xx: tt.temporary}).next(&tt.r, &tt.e, false); got != tt.want {
			t.Errorf("%s: got %d, want %d", tt.why, got, tt.want)
		}
	}
}

func TestMessageIsTriedElsewhereOnce(t *testing.T) {
	for _, code := range []int{451, 503, 530} {
		r := conn.Result{Seq: 2, Used: 2, Begun: true, Worked: true, Replies: conn.Replies{Mail: wireReply(code, 0, 0, 0)}}
		e := Error{Op: OpMail, Outcome: NotAccepted, Reply: Reply{Code: code}}
		for moved, want := range map[bool]next{false: tryElsewhere, true: giveUp} {
			if got := (Retry{}).next(&r, &e, moved); got != want {
				t.Errorf("%d, tried elsewhere: %t: got %d, want %d", code, moved, got, want)
			}
		}
	}
}

// OutcomeOf, ShouldRetry and RetryTo for errors that need no relay.

func TestErrorsOfOtherLibraries(t *testing.T) {
	for _, tt := range []struct {
		err   error
		want  Outcome
		retry bool
	}{
		{nil, Accepted, false},
		{&textproto.Error{Code: 451, Msg: "later"}, NotAccepted, true},
		{&textproto.Error{Code: 550, Msg: "never"}, NotAccepted, false},
		{&textproto.Error{Code: 250, Msg: "what?"}, Unknown, false},
		{&smtp.SMTPError{Code: 452}, NotAccepted, true},
		{&smtp.SMTPError{Code: 554}, NotAccepted, false},
		{fmt.Errorf("job 7: %w", &smtp.SMTPError{Code: 452}), NotAccepted, true},
		{textproto.ProtocolError("short response"), Unknown, false},
		{io.ErrUnexpectedEOF, Unknown, false},
		{context.DeadlineExceeded, Unknown, false},
		{&net.OpError{Op: "dial", Err: errors.New("refused")}, Unknown, false},
		{errors.New("anything"), Unknown, false},
	} {
		if got, retry := OutcomeOf(tt.err), ShouldRetry(tt.err); got != tt.want || retry != tt.retry {
			t.Errorf("%v: got %v, retry %t, want %v, %t", tt.err, got, retry, tt.want, tt.retry)
		}
		if to := RetryTo(tt.err); to != nil {
			t.Errorf("%v: RetryTo is %v", tt.err, to)
		}
	}
}

func TestConstructedErrorDecidesLikeOneOfTheClient(t *testing.T) {
	a := func(o Outcome, code int) RecipientResult {
		return RecipientResult{To: "a@y.example", Outcome: o, Reply: Reply{Code: code}}
	}
	b := func(o Outcome, code int) RecipientResult {
		return RecipientResult{To: "b@y.example", Outcome: o, Reply: Reply{Code: code}}
	}
	for _, tt := range []struct {
		why       string
		err       Error
		retry     bool
		to        []string
		temporary bool
	}{
		{"only a code, temporary", Error{Reply: Reply{Code: 451}, Outcome: NotAccepted}, true, nil, true},
		{"only a code, permanent", Error{Reply: Reply{Code: 550}, Outcome: NotAccepted}, false, nil, false},
		{"the zero value", Error{}, false, nil, false},
		{"a wrong key", Error{Op: OpAuth, Scope: ScopeRelay, Reply: Reply{Code: 535}, Outcome: NotAccepted,
			Recipients: []RecipientResult{a(NotAccepted, 535), b(NotAccepted, 535)}}, true, []string{"a@y.example", "b@y.example"}, false},
		{"a wrong key, after a recipient was refused", Error{Op: OpAuth, Scope: ScopeRelay, Reply: Reply{Code: 535}, Outcome: NotAccepted,
			Recipients: []RecipientResult{a(NotAccepted, 550), b(NotAccepted, 535)}}, true, []string{"b@y.example"}, false},
		{"552 to RCPT: too many recipients (RFC 5321, 4.5.3.1.10)", Error{Op: OpRcpt, Scope: ScopeRecipient, Reply: Reply{Code: 552}, Outcome: NotAccepted,
			Recipients: []RecipientResult{a(NotAccepted, 552)}}, true, []string{"a@y.example"}, true},
		{"one has it, and one was not tried", Error{Op: OpMail, Scope: ScopeRelay, Reply: Reply{Code: 421}, Outcome: Accepted,
			Recipients: []RecipientResult{a(Accepted, 250), b(NotAccepted, 421)}}, false, []string{"b@y.example"}, false},
		{"one may have it", Error{Op: OpEnd, Scope: ScopeRelay, Outcome: Unknown,
			Recipients: []RecipientResult{a(Unknown, 250), b(NotAccepted, 450)}}, false, []string{"b@y.example"}, false},
		{"the relay has lost the connection", Error{Op: OpBody, Scope: ScopeRelay, Outcome: NotAccepted, Err: io.EOF,
			Recipients: []RecipientResult{a(NotAccepted, 250)}}, true, []string{"a@y.example"}, true},
		{"closed", Error{Op: OpWait, Scope: ScopeCaller, Outcome: NotAccepted, Err: ErrClosed, Recipients: []RecipientResult{a(NotAccepted, 0)}},
			true, []string{"a@y.example"}, false},
	} {
		err := &tt.err
		if retry, to := ShouldRetry(err), RetryTo(err); retry != tt.retry || !slices.Equal(to, tt.to) || err.Temporary() != tt.temporary {
			t.Errorf("%s: ShouldRetry %t, RetryTo %v, temporary %t; want %t, %v, %t", tt.why, retry, to, err.Temporary(), tt.retry, tt.to, tt.temporary)
		}
	}
}

func TestOpsAreStableWordsWithATextEach(t *testing.T) {
	words := []Op{"config", "check", "wait", "dial", "greeting", "ehlo", "starttls", "tls", "auth", "rset", "mail", "rcpt", "data", "body", "end", "quit"}
	if len(opTexts) != len(words) {
		t.Errorf("there are %d, want %d", len(opTexts), len(words))
	}
	for _, op := range words {
		if _, ok := opTexts[op]; !ok {
			t.Errorf("%q has no text", op)
		}
	}
	for line, want := range map[string]Op{
		"EHLO client.example": OpEHLO, "HELO client.example": OpEHLO, "STARTTLS": OpSTARTTLS, "AUTH PLAIN [redacted]": OpAuth, "[redacted]": OpAuth, "*": OpAuth,
		"RSET": OpRset, "MAIL FROM:<LAST@x.example>": OpMail, "RCPT TO:<. LAST>": OpRcpt, "DATA": OpData, "BDAT 5": OpData, "BDAT 0 LAST": OpEnd, ".": OpEnd, "QUIT": OpQuit,
	} {
		if got := opOfCommand(line); got != want {
			t.Errorf("%s: got %q, want %q", line, got, want)
		}
	}
}

func TestReplyDecidesTheScope(t *testing.T) {
	for _, tt := range []struct {
		op   Op
		r    Reply
		want Scope
	}{
		{OpRcpt, Reply{Code: 550}, ScopeRecipient},
		{OpRcpt, Reply{Code: 452}, ScopeRecipient},
		{OpRcpt, Reply{Code: 421}, ScopeRelay},
		{OpMail, Reply{Code: 501}, ScopeMessage},
		{OpMail, Reply{Code: 552, EnhancedCode: EnhancedCode{5, 3, 4}}, ScopeMessage},
		{OpMail, Reply{Code: 452, EnhancedCode: EnhancedCode{4, 5, 3}, Message: "Too many messages sent"}, ScopeRelay},
		{OpMail, Reply{Code: 451, EnhancedCode: EnhancedCode{4, 4, 2}, Message: "Timeout - closing connection"}, ScopeRelay},
		{OpMail, Reply{Code: 503, Message: "need AUTH first"}, ScopeRelay},
		{OpMail, Reply{Code: 530}, ScopeRelay},
		{OpMail, Reply{Code: 250}, ScopeRelay}, // although it failed
		{OpData, Reply{Code: 554}, ScopeMessage},
		{OpData, Reply{Code: 432, EnhancedCode: EnhancedCode{4, 3, 2}}, ScopeRelay},
		{OpBody, Reply{Code: 552}, ScopeMessage},
		{OpEnd, Reply{Code: 550}, ScopeMessage},
		{OpEnd, Reply{Code: 354}, ScopeRelay},
		{OpRset, Reply{Code: 500}, ScopeRelay},
		{OpAuth, Reply{Code: 535}, ScopeRelay},
		{OpGreeting, Reply{Code: 554}, ScopeRelay},
	} {
		if got := scopeOfReply(tt.op, tt.r); got != tt.want {
			t.Errorf("%v to %s: got %v, want %v", tt.r, tt.op.Text(), got, tt.want)
		}
	}
}

// What a Message, a Receipt, a Result and an Error show when printed or logged.

const bodyNobodyPrints = "a word in confidence"

func aResult() (Message, Receipt, *Error) {
	m := Message{From: "shop@x.example", To: []string{"a@y.example", "b@y.example"}, Body: Bytes([]byte(bodyNobodyPrints)), Tag: 7}
	rcpts := []RecipientResult{
		{To: "a@y.example", Reply: Reply{Code: 250, Message: "ok"}, Outcome: Accepted, QueueID: "Q1"},
		{To: "b@y.example", Reply: Reply{Code: 550, Message: "no\none"}, Outcome: NotAccepted},
	}
	r := Receipt{Reply: Reply{Code: 250, Message: "queued as Q1"}, QueueID: "Q1", Recipients: rcpts}
	return m, r, &Error{Op: OpRcpt, subject: "<b@y.example>", Reply: rcpts[1].Reply, Outcome: Accepted, Scope: ScopeRecipient, Recipients: rcpts, Attempts: 1}
}

func TestPrintedValuesShowAddressesAndOutcome(t *testing.T) {
	m, r, e := aResult()
	for _, tt := range []struct {
		got  any
		want string
	}{
		{m, `from <shop@x.example> to <a@y.example>, <b@y.example>`},
		{Message{From: NullSender, To: []string{"1@y.example", "2@y.example", "3@y.example", "4@y.example"}}, `from <> to <1@y.example>, <2@y.example>, <3@y.example>, and 1 more`},
		{r, `250 "queued as Q1"; queue ID Q1; accepted for <a@y.example>; not accepted for <b@y.example>`},
		{r.Recipients[1], `<b@y.example> not accepted: 550 "no\none"`},
		{e, `smtprelay: accepted, but not for <b@y.example>: RCPT TO <b@y.example>: 550 "no\none"`},
		{Result{Message: m, Receipt: r}, `from <shop@x.example> to <a@y.example>, <b@y.example>: 250 "queued as Q1"; queue ID Q1; accepted for <a@y.example>; not accepted for <b@y.example>`},
		{Result{Message: m, Receipt: r, Err: e}, `from <shop@x.example> to <a@y.example>, <b@y.example>: smtprelay: accepted, but not for <b@y.example>: RCPT TO <b@y.example>: 550 "no\none"`},
	} {
		for _, verb := range []string{"%v", "%+v", "%s"} {
			if got := fmt.Sprintf(verb, tt.got); got != tt.want {
				t.Errorf("%T by %s: got %s, want %s", tt.got, verb, got, tt.want)
			}
		}
	}
}

func TestBodyIsNeverPrintedOrLogged(t *testing.T) {
	m, r, e := aResult()
	var out bytes.Buffer
	text := slog.New(slog.NewTextHandler(&out, nil))
	json := slog.New(slog.NewJSONHandler(&out, nil))
	for _, v := range []any{m, &m, Result{Message: m, Receipt: r, Err: e}, &Result{Message: m}, SendDoneInfo{Message: m}, []Message{m}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d", "%T"} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
	}
	for _, v := range []any{m, Result{Message: m, Receipt: r, Err: e}, r, e} {
		text.Info("x", "v", v)
		json.Info("x", "v", v)
	}
	for _, secret := range []string{bodyNobodyPrints, fmt.Sprintf("%x", bodyNobodyPrints), strings.Trim(fmt.Sprint([]byte(bodyNobodyPrints)), "[]")} {
		if strings.Contains(out.String(), secret) {
			t.Errorf("the body is in %s", out.String())
		}
	}
	for _, want := range []string{"v.step=rcpt", "v.outcome=accepted", "v.scope=recipient", "v.code=550", `"not_accepted":1`, `"from":"<shop@x.example>"`} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%s is not logged", want)
		}
	}
}

// Structs of options may get a field that is not comparable, so none is comparable now.
func TestOptionsCannotBeCompared(t *testing.T) {
	for _, options := range []any{Config{}, Limits{}, Retry{}, Timeouts{}, Message{}, Trace{}} {
		if reflect.TypeOf(options).Comparable() {
			t.Errorf("%T can be compared", options)
		}
	}
}

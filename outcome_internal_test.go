package smtprelay

// What the end of a transaction means for its message and each recipient: every row is a Result and what the RFC, or the
// relays that are known, make of it.

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// code is a reply of a code alone; 0: none.
func code(n int) wire.Reply { return wire.Reply{Code: n} }

// codes are replies to RCPT.
func codes(n ...int) (replies []wire.Reply) {
	for _, c := range n {
		replies = append(replies, code(c))
	}
	return replies
}

// replies are those to MAIL, DATA and the final dot, and to each RCPT.
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
		{"and for some recipients: for those", conn.Result{Replies: replies(250, 354, 250, 250, 550), End: conn.EndSent}, false, ""},
		{"what happens to the connection later means nothing", conn.Result{Replies: replies(250, 354, 250, 250), End: conn.EndSent, Lost: eof, CtxErr: context.Canceled}, false, ""},
		{"4xx to the final dot", conn.Result{Replies: replies(250, 354, 451, 250), End: conn.EndSent}, false, "not accepted: end 451"},
		{"5xx to the final dot", conn.Result{Replies: replies(250, 354, 554, 250), End: conn.EndSent}, false, "not accepted: end 554"},
		{"421 to the final dot (3.8)", conn.Result{Replies: replies(250, 354, 421, 250), End: conn.EndSent, Lost: gone421}, false, "not accepted: end 421"},
		{"3xx to the final dot means nothing", conn.Result{Replies: replies(250, 354, 354, 250), End: conn.EndSent}, false, "unknown: end 354"},
		{"in chunks the last BDAT decides (RFC 3030, 2)", conn.Result{Replies: replies(250, 250, 552, 250), End: conn.EndSent, Chunked: true}, false, "not accepted: end 552"},

		// RFC 1047: without that reply nobody knows.
		{"lost behind the final dot", conn.Result{Replies: replies(250, 354, 0, 250), End: conn.EndSent, Begun: true, Lost: eof}, false, "unknown: end"},
		{"no reply in time", conn.Result{Replies: replies(250, 354, 0, 250), End: conn.EndSent, Begun: true, Lost: timeout}, false, "unknown: end"},
		{"the caller has gone, the dot has left", conn.Result{Replies: replies(250, 354, 0, 250), End: conn.EndSent, CtxErr: context.Canceled}, false, "unknown: end"},
		{"and where it will leave", conn.Result{Replies: replies(250, 354, 0, 250), End: conn.EndDue, CtxErr: context.Canceled}, false, "unknown: end"},
		{"in chunks, with no reply to anything", conn.Result{Replies: replies(0, 0, 0, 0), End: conn.EndSent, Chunked: true, Begun: true, Waiting: conn.StepMail, Lost: eof}, false, "unknown: end"},

		// Until the end has left the relay has no message.
		{"the dot was written and did not leave", conn.Result{Replies: replies(250, 354, 0, 250), End: conn.EndUnsent, Begun: true, Lost: eof}, false, "not accepted: end"},
		{"lost within the body", conn.Result{Replies: replies(250, 354, 0, 250), Begun: true, Lost: eof}, false, "not accepted: body"},
		{"the body failed", conn.Result{Replies: replies(250, 354, 0, 250), Begun: true, BodyErr: body, Lost: errors.New("given up")}, false, "not accepted: body"},
		{"lost at the envelope", conn.Result{Replies: replies(250, 0, 0, 0), Begun: true, Waiting: conn.StepRcpt, Lost: eof}, false, "not accepted: rcpt"},
		{"lost before a word", conn.Result{Replies: replies(0, 0, 0, 0), Lost: eof}, false, "not accepted: wait"},
		{"the relay says on its way out why it takes no body", conn.Result{Replies: replies(250, 354, 0, 250), Begun: true, Lost: &conn.UnexpectedReply{Reply: code(552)}}, false, "not accepted: body 552"},
		{"a reply too many that refuses nothing is no reason", conn.Result{Replies: replies(250, 354, 0, 250), Begun: true, Lost: &conn.UnexpectedReply{Reply: code(250)}}, false, "not accepted: body"},
		{"421 to another message is for all", conn.Result{Replies: replies(0, 0, 0, 0), Begun: true, Waiting: conn.StepMail, Lost: gone421}, false, "not accepted: mail 421"},
		{"another's reply that cannot be is not this one's", conn.Result{Replies: replies(0, 0, 0, 0), Begun: true, Waiting: conn.StepMail, Lost: &conn.ReplyError{Step: conn.StepFinalDot, Reply: code(354)}}, false, "not accepted: mail"},

		// The first refusal is the reason.
		{"MAIL refused", conn.Result{Replies: replies(550, 503, 0, 503), Begun: true}, false, "not accepted: mail 550"},
		{"the only recipient refused, and so DATA", conn.Result{Replies: replies(250, 554, 0, 550), Begun: true}, false, "not accepted: rcpt 550"},
		{"one of two refused, and DATA for a reason of its own", conn.Result{Replies: replies(250, 451, 0, 250, 550), Begun: true}, false, "not accepted: data 451"},
		{"one of two refused for all or nothing", conn.Result{Replies: replies(250, 0, 0, 250, 452), Begun: true}, true, "not accepted: rcpt 452"},
		{"421 to one recipient is for all (RFC 5321, 3.8)", conn.Result{Replies: replies(250, 0, 0, 250, 421), Begun: true, Lost: gone421}, false, "not accepted: rcpt 421"},
		{"AUTH refused ahead of the envelope", conn.Result{Replies: conn.Replies{Auth: code(535), Mail: code(530), Rcpt: codes(503)}, Begun: true}, false, "not accepted: auth 535"},
		{"RSET refused, the rest taken: no harm", conn.Result{Replies: conn.Replies{Rset: code(500), Mail: code(250), Rcpt: codes(250), Final: code(250)}, End: conn.EndSent}, false, ""},
		{"RSET refused, and what came behind it", conn.Result{Replies: conn.Replies{Rset: code(503), Mail: code(503), Rcpt: codes(503)}, Begun: true}, false, "not accepted: rset 503"},

		// The wrong envelope.
		{"MAIL refused, a recipient taken, the message too: for whom?", conn.Result{Replies: replies(503, 354, 250, 250), End: conn.EndSent}, false, "unknown: end 250"},
		{"a chunk refused, its end taken", conn.Result{Replies: replies(250, 552, 250, 250), End: conn.EndSent, Chunked: true}, false, "unknown: end 250"},
		{"MAIL refused, a recipient taken, no reply to the end", conn.Result{Replies: replies(503, 0, 0, 250), End: conn.EndSent, Chunked: true, Lost: eof}, false, "unknown: end"},
		{"all refused: the end cannot have been taken", conn.Result{Replies: replies(503, 0, 0, 503), End: conn.EndSent, Chunked: true, Lost: eof}, false, "not accepted: mail 503"},

		// Replies come in order (RFC 2920, 3.2).
		{"a 421 before, then an orderly close: nothing was taken", conn.Result{Replies: replies(0, 0, 0, 0), End: conn.EndSent, Chunked: true, Begun: true, Waiting: conn.StepMail, Lost: gone421, Left421: true}, false, "not accepted: mail 421"},
		{"a 421 before, then a reset: words may be missing", conn.Result{Replies: replies(0, 0, 0, 0), End: conn.EndSent, Chunked: true, Begun: true, Waiting: conn.StepMail, Lost: gone421}, false, "unknown: end"},
		{"a reply to this one between", conn.Result{Replies: replies(250, 0, 0, 0), End: conn.EndSent, Chunked: true, Begun: true, Waiting: conn.StepRcpt, Lost: gone421, Left421: true}, false, "unknown: end"},
		{"421 to its RCPT, another taken, then an orderly close", conn.Result{Replies: replies(250, 0, 0, 250, 421), End: conn.EndSent, Chunked: true, Lost: gone421, Left421: true}, false, "not accepted: rcpt 421"},
		{"the same, then a reset", conn.Result{Replies: replies(250, 0, 0, 250, 421), End: conn.EndSent, Chunked: true, Lost: gone421}, false, "unknown: end"},

		// What stood behind a final dot may have been thrown away.
		{"replies too few behind a final dot", conn.Result{Replies: conn.Replies{Rset: code(250), Mail: code(250), Rcpt: codes(550)}, Overlapped: true, Begun: true, Waiting: conn.StepData, Lost: timeout}, false, "not accepted: data"},
		{"the same where nothing was overlapped: it is RCPT's", conn.Result{Replies: conn.Replies{Rset: code(250), Mail: code(250), Rcpt: codes(550)}, Begun: true, Waiting: conn.StepData, Lost: timeout}, false, "not accepted: rcpt 550"},

		{"the caller has gone before the end", conn.Result{Replies: replies(250, 0, 0, 0), Begun: true, Waiting: conn.StepRcpt, CtxErr: context.Canceled, Cancelled: true, Lost: eof}, false, "not accepted: rcpt"},
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
		{"the body's error, although the caller has gone since", conn.Result{BodyErr: body, CtxErr: context.Canceled, Begun: true}, body},
		{"the context's, where it ended the connection under the body", conn.Result{BodyErr: body, CtxErr: context.Canceled, Cancelled: true, Begun: true}, context.Canceled},
		{"the context's before the connection's", conn.Result{CtxErr: context.DeadlineExceeded, Lost: io.EOF, Begun: true}, context.DeadlineExceeded},
		{"the context's behind the final dot", conn.Result{CtxErr: context.DeadlineExceeded, Lost: io.EOF, End: conn.EndSent}, context.DeadlineExceeded},
		{"the connection's", conn.Result{Lost: io.EOF, Begun: true}, io.EOF},
	} {
		tt.r.Replies = replies(250, 354, 0, 250)
		if e := verdict(&Message{To: []string{"b@y.example"}}, []int{0}, &tt.r); e == nil || !errors.Is(e, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.why, e, tt.want)
		}
	}
	e := verdict(&Message{To: []string{"b@y.example"}}, []int{0}, &conn.Result{Replies: replies(250, 354, 0, 250), BodyErr: &conn.SizeError{Limit: 9}})
	if e.Temporary() {
		t.Errorf("%v: temporary, want permanent: it will be as large the next time", e)
	}
}

func TestEachRecipientHasItsFate(t *testing.T) {
	accepted, unknown, failed := (*Error)(nil), &Error{Outcome: Unknown}, &Error{Outcome: NotAccepted}
	for _, tt := range []struct {
		why       string
		mail      int
		rcpt      []int // the first one's fate is looked at
		e         *Error
		all       bool
		temporary bool // Retry.On4xx
		want      fate
	}{
		{"accepted with the message", 250, []int{250}, accepted, false, false, fateAccepted},
		{"251 will forward (RFC 5321, 3.4)", 250, []int{251}, accepted, false, false, fateAccepted},
		{"refused beside others who got it", 250, []int{550, 250}, accepted, false, false, fateRefused},
		{"refused for now: the caller knows how long it can wait", 250, []int{450, 250}, accepted, false, false, fateRefused},
		{"refused for now, and the caller has said to wait", 250, []int{450, 250}, accepted, false, true, fateLater},
		{"too many recipients: the next transaction (4.5.3.1.10)", 250, []int{452, 250}, accepted, false, false, fateOpen},
		{"552 for 452, as older relays say", 250, []int{552, 250}, accepted, false, false, fateOpen},
		{"452 to all of them: not their number, but the relay", 250, []int{452, 452}, failed, false, false, fateRefused},
		{"the final dot's reply is missing", 250, []int{250}, unknown, false, false, fateUnknown},
		{"and, in chunks, RCPT's too", 250, []int{0}, unknown, false, false, fateUnknown},
		{"refused before the end went missing", 250, []int{550, 250}, unknown, false, false, fateRefused},
		{"the message failed, the recipient was accepted", 250, []int{250}, failed, false, false, fateOpen},
		{"MAIL failed: RCPT's refusal is a consequence", 451, []int{503}, failed, false, false, fateOpen},
		{"421 is about the connection (3.8)", 250, []int{421}, failed, false, false, fateOpen},
		{"a reply to RCPT that cannot be", 250, []int{354}, failed, false, false, fateOpen},
		{"all or nothing: refused with the message, not alone", 250, []int{550, 250}, failed, true, false, fateOpen},
	} {
		r := &conn.Result{Replies: replies(tt.mail, 0, 0, tt.rcpt...)}
		if got := fateOf(&Message{AllOrNothing: tt.all}, r, 0, tt.e, tt.temporary, false); got != tt.want {
			t.Errorf("%s: got %d, want %d", tt.why, got, tt.want)
		}
	}
}

func TestTooManyRecipientsIsTheirNumberOnlyWhereThatIsSaid(t *testing.T) {
	full := wire.Reply{Code: 452, Enhanced: [3]int{4, 2, 2}, Text: "mailbox full"}
	number := wire.Reply{Code: 452, Enhanced: [3]int{4, 5, 3}}
	for _, tt := range []struct {
		why     string
		rcpt    []wire.Reply
		tooMany int
		sure    bool
	}{
		{"none", codes(250, 250), 0, true},
		{"the last ones, in as many words", []wire.Reply{code(250), number, number}, 2, true},
		{"a mailbox that is full", []wire.Reply{code(250), full}, 1, false},
		{"452 alone, at the end of several", codes(250, 250, 452), 1, true},
		{"452 alone, of two: it may be the mailbox", codes(250, 452), 1, false},
		{"one accepted behind it: not their number", codes(250, 452, 250), 1, false},
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

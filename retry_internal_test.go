package smtprelay

// What is done after a transaction that ended in an error.

import (
	"context"
	"errors"
	"io"
	"testing"

	"github.com/smtprelay/smtprelay/internal/conn"
)

func TestResultDecidesWhatIsDoneNext(t *testing.T) {
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
		{"the caller has gone", first(conn.Result{CtxErr: context.Canceled}), lost(OpMail), true, giveUp},
		{"the body cannot be written", first(conn.Result{BodyErr: errors.New("disk failed")}), lost(OpBody), true, giveUp},

		{"lost on the way: nothing was accepted", first(mail250), lost(OpBody), false, retryLater},
		{"lost before a word, on a new connection", conn.Result{}, lost(OpWait), false, retryLater},
		{"lost before a word, on one that had a message before: it was idle", conn.Result{Used: 2}, lost(OpWait), false, retryNow},
		{"lost before MAIL was answered, on such a one", later(conn.Result{}), lost(OpMail), false, retryNow},
		{"lost behind MAIL's reply: it cost the relay an attempt", later(mail250), lost(OpRcpt), false, retryLater},
		{"421 in place of MAIL's reply, on such a one (RFC 5321, 3.8)", later(conn.Result{}), refused(OpMail, 421), false, retryNow},
		{"421 to the first message", first(conn.Result{}), refused(OpMail, 421), false, retryLater},
		{"Gmail has ended the idle connection", later(conn.Result{Replies: conn.Replies{Mail: wireReply(451, 4, 4, 2)}}), refused(OpMail, 451), false, retryNow},
		{"OpenSMTPD wants another connection", later(conn.Result{Replies: conn.Replies{Mail: wireReply(452, 4, 5, 3)}}), refused(OpMail, 452), false, retryNow},
		{"but not for the first message", first(conn.Result{Replies: conn.Replies{Mail: wireReply(452, 4, 5, 3)}}), refused(OpMail, 452), false, giveUp},

		{"Microsoft 365: too many connections", first(mail250), refused(OpEnd, 432), false, waitForSlot},
		{"AUTH with commands behind it refused: it goes alone from now on", first(conn.Result{LedByAuth: true}), refused(OpAuth, 535), false, retryNow},
		{"hung up at AUTH with commands behind it", first(conn.Result{LedByAuth: true}), lost(OpAuth), false, retryNow},
		{"hung up behind it", first(conn.Result{LedByAuth: true, Replies: conn.Replies{Auth: code(235)}}), lost(OpMail), false, retryNow},
		{"MAIL refused behind AUTH", first(conn.Result{LedByAuth: true, Replies: conn.Replies{Auth: code(235), Mail: code(550)}}), refused(OpMail, 550), false, retryNow},
		{"a recipient refused behind both is refused", first(conn.Result{LedByAuth: true, Replies: replies(250, 0, 0, 0)}), refused(OpRcpt, 550), false, giveUp},

		{"Amazon SES: messages come too fast", first(mail250), Error{Op: OpEnd, Outcome: NotAccepted, Reply: Reply{Code: 454, Message: "Throttling failure: Maximum sending rate exceeded."}}, false, waitForPace},
		{"Amazon SES: nothing more today", first(mail250), Error{Op: OpEnd, Outcome: NotAccepted, Reply: Reply{Code: 454, Message: "Throttling failure: Daily message quota exceeded."}}, false, giveUp},
		{"4xx to MAIL on a connection that has had other messages: it may be about that", later(conn.Result{Worked: true, Replies: conn.Replies{Mail: code(451)}}), refused(OpMail, 451), false, tryElsewhere},
		{"4xx to MAIL where nothing else came to anything either", later(conn.Result{Replies: conn.Replies{Mail: code(451)}}), refused(OpMail, 451), false, giveUp},
		{"4xx to the first MAIL is not", first(conn.Result{Replies: conn.Replies{Mail: code(451)}}), refused(OpMail, 451), false, giveUp},
		{"the login is forgotten (RFC 4954, 6)", later(conn.Result{Replies: conn.Replies{Mail: code(530)}}), refused(OpMail, 530), false, tryElsewhere},

		{"RSET refused behind a final dot: no more overlap", later(conn.Result{Overlapped: true, Replies: conn.Replies{Mail: code(250)}}), refused(OpRset, 503), false, retryNow},
		{"RSET refused: the message was not offered yet", later(mail250), refused(OpRset, 500), false, retryNow},
		{"a reply that cannot be, behind a final dot", later(conn.Result{Overlapped: true, Replies: conn.Replies{Mail: code(250)}}), refused(OpData, 250), false, retryNow},
		{"a reply that cannot be", first(mail250), refused(OpData, 250), false, retryLater},
		{"503 to MAIL: the relay has another idea of the connection", later(conn.Result{Replies: conn.Replies{Mail: code(503)}}), refused(OpMail, 503), false, tryElsewhere},
		{"503 to the first MAIL will not get better", first(conn.Result{Replies: conn.Replies{Mail: code(503)}}), refused(OpMail, 503), false, giveUp},

		{"4xx: the caller knows how long it can wait", first(mail250), refused(OpEnd, 451), false, giveUp},
		{"4xx, and the caller has said to try", first(mail250), refused(OpEnd, 451), true, retryLater},
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

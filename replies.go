package smtprelay

import (
	"regexp"
	"slices"
	"strings"
)

// meaning is what relays say with more than the class of a reply's code.
type meaning int

const (
	tooManyConns     meaning = iota // this connection is one too many
	saysTooManyConns                // the same, in words: a code alone does not tell it from other faults
	tooManyMessages                 // this connection has had its share of messages; another one may have this message
	tooManyRcpts                    // the recipient may have another transaction
	numberOfRcpts                   // of a reply that says tooManyRcpts: it is about their number, not about one mailbox
	idleTooLong                     // the relay was ending the idle connection when the command came
	loginForgotten                  // the relay wants AUTH, on a connection that has authenticated
	tooManyLogins                   // AUTH was tried too often; it may be tried again after a while
	tooFast                         // messages come faster than the relay takes them from this client
	quotaUsedUp                     // the account may send nothing more today, or at all
	recipientBusy                   // it is about the mailbox of one recipient, and nothing that the client does
)

// meanings are the replies that mean something. A row matches a reply that fits all of its columns.
var meanings = []struct {
	means  meaning
	source string // who says so, or where it is written
	ops    []Op   // replies to which commands; nil: any
	code   int    // three digits, or the class alone; 0: any refusal
	detail [2]int // subject and detail of the enhanced code (RFC 3463); zero: any
	bare   bool   // there is no enhanced code
	text   *regexp.Regexp
}{
	{means: tooManyConns, source: "any relay that leaves before the first message", ops: beforeMail, code: 421},
	{means: tooManyConns, source: "Microsoft 365: 432 4.3.2 Concurrent connections limit exceeded", code: 432},
	{means: tooManyConns, source: "Mailtrap: 535 5.7.8 and words", ops: beforeMail, text: words("too many.*connection|connection.*too many")},

	{means: saysTooManyConns, source: "Microsoft 365: Concurrent connections limit exceeded; Mailtrap: Too many connections per account; SES: Too many concurrent SMTP connections", text: words("too many.*connection|connection.*too many|concurrent|connection.*limit")},

	{means: tooManyMessages, source: "OpenSMTPD: 452 4.5.3 Too many messages sent; the connection stays open", ops: []Op{OpMail}, code: 4, detail: [2]int{5, 3}},

	{means: tooManyMessages, source: "Emailit, SES, SparkPost and others: maximum number of messages per session exceeded", ops: inTransaction, text: words(`(message|mail|transaction|recipient)s?\b.{0,40}\b(session|connection)\b|(session|connection)\b.{0,40}\b(message|mail|transaction|recipient)s?\b.{0,20}(limit|exceeded)|maximum message count`)},

	{means: loginForgotten, source: "RFC 4954, 6: 530 5.7.0 Authentication required", ops: inTransaction, code: 530},
	{means: loginForgotten, source: "relays that say it in words: 550 5.7.1 Authentication required", ops: inTransaction, text: words("authenticat|log ?in|auth (is )?required|auth.*first")},

	{means: tooManyLogins, source: "Gmail: 454 4.7.0 Too many login attempts", ops: beforeMail, code: 4, text: words("too many.*(log|auth)")},

	{means: quotaUsedUp, source: "Amazon SES: 454 Throttling failure: Daily message quota exceeded", text: words("daily|quota|monthly")},
	{means: quotaUsedUp, source: "SendGrid: 451 Authentication failed: Maximum credits exceeded; 451 You've exceeded your messaging limits", text: words("credits|messaging limits")},

	{means: recipientBusy, source: "Gmail: 450 4.2.1 The user you are trying to contact is receiving mail at a rate that ...", text: words("user you are trying to contact|is receiving")},

	{means: tooFast, source: "Amazon SES: 454 Throttling failure: Maximum sending rate exceeded", ops: inMessage, code: 4, text: words("sending rate|rate (limit )?exceeded|ratelimit|rate.?limit|limit rate|throttl")},
	{means: tooFast, source: "Emailit: 452 4.4.5 Messages per second limit exceeded; Mailtrap: 550 5.7.0 too many emails per second", ops: inMessage, text: words("per (second|minute)")},
	{means: tooFast, source: "MailerSend: 450 Too many requests #MS-ST-G", ops: inMessage, code: 4, text: words("too many requests")},
	{means: tooFast, source: "Google Workspace: 450 4.2.1 Peak SMTP relay limit exceeded", ops: inMessage, code: 4, text: words("peak smtp relay limit")},
	{means: tooFast, source: "Postfix: 450 4.7.1 Error: too much mail from", ops: inMessage, code: 4, text: words("too much mail")},

	{means: tooManyRcpts, source: "RFC 5321, 4.5.3.1.10", ops: []Op{OpRcpt}, code: 452},
	{means: tooManyRcpts, source: "RFC 5321, 4.5.3.1.10: older relays", ops: []Op{OpRcpt}, code: 552},
	{means: tooManyRcpts, source: "RFC 3463, 3.6: too many recipients", ops: []Op{OpRcpt}, detail: [2]int{5, 3}},

	{means: numberOfRcpts, source: "RFC 3463, 3.6; 452 alone is also said of a mailbox that is full", ops: []Op{OpRcpt}, detail: [2]int{5, 3}},
	{means: numberOfRcpts, source: "Postfix, Exim: too many recipients", ops: []Op{OpRcpt}, text: words("too many")},

	{means: idleTooLong, source: "Gmail: 451 4.4.2 Timeout - closing connection", ops: []Op{OpMail}, code: 451, detail: [2]int{4, 2}},
	{means: idleTooLong, source: "Amazon SES: 451 Timeout waiting for data from client", ops: []Op{OpMail}, code: 451, bare: true, text: words("^timeout waiting")},
}

// inTransaction are the commands of an envelope, and inMessage these and the end of a message.
var (
	inTransaction = []Op{OpMail, OpRcpt, OpData}
	inMessage     = []Op{OpMail, OpRcpt, OpData, OpEnd}
)

// beforeMail are the commands before the first message, and the greeting.
var beforeMail = []Op{OpGreeting, OpEHLO, OpAuth}

func words(pattern string) *regexp.Regexp { return regexp.MustCompile("(?is)" + pattern) }

// says reports whether r, the reply to op, has the meaning what.
func (r Reply) says(what meaning, op Op) bool {
	if r.Code < 400 {
		return false
	}
	for i := range meanings {
		m := &meanings[i]
		if m.means == what &&
			(m.ops == nil || slices.Contains(m.ops, op)) &&
			(m.code == 0 || m.code == r.Code || m.code == r.Code/100) &&
			(m.detail == [2]int{} || m.detail == [2]int(r.EnhancedCode[1:])) &&
			(!m.bare || r.EnhancedCode == EnhancedCode{}) &&
			(m.text == nil || m.text.MatchString(r.Message)) {
			return true
		}
	}
	return false
}

// endsSession reports whether r, the reply to op in the seqth transaction of a connection, is about the connection and not about
// the message: another connection may have that. worked: an earlier transaction of the connection came to something.
func (r Reply) endsSession(op Op, seq int, worked bool) bool {
	switch {
	case r.says(tooManyMessages, op), r.says(idleTooLong, op):
		return true
	case seq <= 1:
		return false
	}
	return r.says(loginForgotten, op) || worked && r.isUnclear(op)
}

// isUnclear reports whether r refuses a whole message for now and does not say why in words that are known. On a connection that
// has had other messages it may be about that one.
func (r Reply) isUnclear(op Op) bool {
	if r.Code/100 != 4 || r.Code == 421 || op != OpMail && op != OpData {
		return false
	}
	for _, known := range []meaning{tooManyConns, quotaUsedUp, recipientBusy, tooFast} {
		if r.says(known, op) {
			return false
		}
	}
	return true
}

// throttles reports whether r, the reply to op, says that messages come too fast. Some relays say so of an allowance of the day,
// and of one recipient's mailbox, in nearly the same words.
func (r Reply) throttles(op Op) bool {
	return r.says(tooFast, op) && !r.says(quotaUsedUp, op) && !r.says(recipientBusy, op)
}

// queueIDs find the relay's identifier of a message in its final reply; the first that finds one counts.
var queueIDs = []*regexp.Regexp{
	queueID(`\[InternalId=`),                                        // Exchange, Microsoft 365, which name the message's own ID first
	queueID(`queued (?:as|with id)[ =:]*<?`),                        // Postfix, SendGrid, NetEase
	queueID(`queued (?:on|at|in|by|to) \S+ (?:as|with id)[ =:]*<?`), // Yandex
	queueID(`queued (?:mail |message )?for delivery (?:as|with id)[ =:]*<?`),
	regexp.MustCompile(`(?i)queued on \S+ ([\w-]*\d[\w-]*)$`),                        // Yandex, lately
	regexp.MustCompile(`(?i)queued \((` + queueWord + `)\)`),                         // Haraka
	regexp.MustCompile(`(?i)(` + queueWord + `) - gsmtp`),                            // Google
	regexp.MustCompile(`(?i)^ok \d+ qp (\d+)`),                                       // qmail
	queueID(`received ok \[`),                                                        // Mimecast
	queueID(`\bid[ =:]+<?`),                                                          // Exim
	regexp.MustCompile(`(?i)\bmessage (\d+) accepted`),                               // Cisco
	regexp.MustCompile(`(?i)^<?(` + queueWord + `)>? message accepted for delivery`), // OpenSMTPD, Sendmail
	queueID(`message accepted for delivery[ =:]*<?`),
	regexp.MustCompile(`(?i)^ok:?[ ]+<?([\w.+/-]{12,})>?$`), // Amazon SES
}

// queueWord is an identifier: what stands between blanks, brackets or quotes.
const queueWord = `[\w-][^\s<>()\[\]"';]*`

func queueID(after string) *regexp.Regexp {
	return regexp.MustCompile(`(?i)` + after + `(` + queueWord + `)`)
}

// maxQueueID is how long an identifier may be, in octets. Those of real relays have up to some 100. A longer one is none: a
// part of it would find nothing.
const maxQueueID = 128

// findQueueID returns the identifier in the text of a final reply, in printable ASCII; "" if there is none.
func findQueueID(text string) string {
	// The common case, without the cost of a search.
	if _, id, ok := strings.Cut(text, "queued as "); ok && isWord(id) && isQueueID(id) {
		return id
	}
	for _, re := range queueIDs {
		if m := re.FindStringSubmatch(text); m != nil {
			if id := strings.TrimRight(m[1], ".,:!?"); isQueueID(id) {
				return id
			}
		}
	}
	return ""
}

// isQueueID reports whether a word where an identifier may stand can be one. "As soon as possible" has none.
func isQueueID(s string) bool {
	lower := func(r rune) bool { return 'a' <= r && r <= 'z' }
	return len(s) <= maxQueueID && isPrintable(s) && strings.TrimFunc(s, lower) != ""
}

// isWord reports whether s consists of letters, digits, hyphens and underscores.
func isWord(s string) bool {
	for _, c := range []byte(s) {
		if !('0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c == '-' || c == '_') {
			return false
		}
	}
	return s != ""
}

package smtprelay

import (
	"regexp"
	"slices"
	"strings"
)

// meaning is a condition that a reply expresses by more than the first digit of its code.
type meaning int

const (
	tooManyConns     meaning = iota // there are too many connections
	saysTooManyConns                // there are too many connections, recognized by the text, because the code alone is ambiguous
	tooManyMessages                 // the connection has reached its limit of messages; another connection may take this one
	tooManyRcpts                    // too many recipients: another transaction may take this one
	numberOfRcpts                   // narrows tooManyRcpts: the reply is about the number of recipients, not about a mailbox
	idleTooLong                     // the relay was closing the idle connection when the command arrived
	loginForgotten                  // the relay demands AUTH on an authenticated connection
	tooManyLogins                   // too many AUTH attempts; a later attempt may succeed
	tooFast                         // messages come faster than the relay accepts them from this client
	quotaUsedUp                     // the account has used up its quota
	recipientBusy                   // the mailbox of one recipient receives too much; the client is not the cause
)

// meanings maps replies to meanings. A row matches a reply that matches all of its columns.
var meanings = []struct {
	means  meaning
	source string // the relay that sends such a reply, or the document that defines it
	ops    []Op   // commands that the reply answers; nil: any
	code   int    // three digits, or the class alone; 0: any refusal
	detail [2]int // subject and detail of the enhanced code (RFC 3463); zero: any
	bare   bool   // the reply has no enhanced code
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

// inTransaction lists the commands of an envelope; inMessage adds the end of the message.
var (
	inTransaction = []Op{OpMail, OpRcpt, OpData}
	inMessage     = []Op{OpMail, OpRcpt, OpData, OpEnd}
)

// beforeMail lists the steps before the first message.
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
// the message, so that another connection may take the message. For worked see conn.Result.Worked.
func (r Reply) endsSession(op Op, seq int, worked bool) bool {
	switch {
	case r.says(tooManyMessages, op), r.says(idleTooLong, op):
		return true
	case seq <= 1:
		return false
	}
	return r.says(loginForgotten, op) || worked && r.isUnclear(op)
}

// isUnclear reports whether r temporarily refuses a whole message for an unknown reason. On a connection that has served other
// messages, r may be about the connection.
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

// throttles reports whether r, the reply to op, says that messages come too fast. It excludes daily quotas and busy mailboxes,
// for which some relays use nearly the same text.
func (r Reply) throttles(op Op) bool {
	return r.says(tooFast, op) && !r.says(quotaUsedUp, op) && !r.says(recipientBusy, op)
}

// queueIDs match the relay's identifier of a message in its final reply; the first match counts.
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

// queueWord matches an identifier, which is delimited by spaces, brackets or quotes.
const queueWord = `[\w-][^\s<>()\[\]"';]*`

func queueID(after string) *regexp.Regexp {
	return regexp.MustCompile(`(?i)` + after + `(` + queueWord + `)`)
}

// maxQueueID is the maximum length of an identifier in octets. Identifiers of real relays have up to about 100. A longer one is
// ignored, not cut, because a part of an identifier is useless in a search.
const maxQueueID = 128

// findQueueID returns the identifier in the text of a final reply, in printable ASCII; "" if there is none.
func findQueueID(text string) string {
	// The common case, without regular expressions.
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

// isQueueID reports whether s, found in the place of an identifier, can be one. A lower-case word cannot, as in "queued as soon
// as possible".
func isQueueID(s string) bool {
	notLower := func(r rune) bool { return r < 'a' || r > 'z' }
	return len(s) <= maxQueueID && strings.ContainsFunc(s, notLower) && isPrintable(s)
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

package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/smtprelay/smtprelay"
)

// A sending is a message, and what the client reported about it.
type sending struct {
	id   string // in the X-Check field, by which the ledger is searched
	from string
	to   []string
	body io.WriterTo
	want string // the body as it must arrive, with LF line ends
	json string // the X-SMTPAPI field as it must arrive, unfolded; "" means none

	allOrNothing bool
	options      *smtprelay.MailOptions

	done    bool // Send has returned
	receipt smtprelay.Receipt
	err     error
}

func (s *sending) header() string {
	return "Date: Tue, 24 Nov 2026 12:00:00 +0000\r\nFrom: " + "shop@client.example" + "\r\nTo: undisclosed-recipients:;\r\n" +
		"Message-ID: <" + strings.ReplaceAll(s.id, " ", "-") + "@client.example>\r\nSubject: check\r\nX-Check: " + s.id + "\r\n\r\n"
}

// setBody sets the body to text, which may have line ends of any kind.
func (s *sending) setBody(text string) {
	s.body = smtprelay.Bytes([]byte(s.header() + text))
	s.want = strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(text)
	if s.want != "" && !strings.HasSuffix(s.want, "\n") {
		s.want += "\n"
	}
}

// lastLine is the last line as sent, with dot stuffing.
func (s *sending) lastLine() []byte {
	text := strings.TrimSuffix(s.want, "\n")
	return []byte(text[strings.LastIndexByte(text, '\n')+1:] + "\r\n")
}

func (s *sending) message() smtprelay.Message {
	return smtprelay.Message{From: cmp.Or(s.from, smtprelay.NullSender), To: s.to, Body: s.body, AllOrNothing: s.allOrNothing, MailOptions: s.options}
}

// outcome is what the client reported, in one word.
func (s *sending) outcome() smtprelay.Outcome {
	if s.err == nil {
		return smtprelay.Accepted
	}
	e, ok := errors.AsType[*smtprelay.Error](s.err)
	if !ok {
		return smtprelay.Unknown
	}
	return e.Outcome
}

// fates is the outcome that the client reported for each recipient, or an error if it reported two different ones.
func (s *sending) fates() (map[string]smtprelay.Outcome, error) {
	told := make(map[string]smtprelay.Outcome)
	for _, r := range s.receipt.Recipients {
		told[r.To] = r.Outcome
	}
	fates := make(map[string]smtprelay.Outcome)
	for _, to := range s.to {
		o, ok := told[to]
		switch {
		case s.err == nil && !ok:
			return nil, fmt.Errorf("no error, and the receipt does not mention <%s>", to)
		case s.err == nil && o != smtprelay.Accepted:
			return nil, fmt.Errorf("no error, and the receipt says %q for <%s>", o, to)
		case !ok:
			o = s.outcome()
			if o == smtprelay.Accepted {
				return nil, fmt.Errorf("accepted in part, and the receipt does not mention <%s>", to)
			}
		}
		fates[to] = o
	}
	if s.err == nil {
		return fates, nil
	}
	e, ok := errors.AsType[*smtprelay.Error](s.err)
	if !ok {
		return nil, fmt.Errorf("the error is not an *Error but a %T: %w", s.err, s.err)
	}
	if e.Outcome == smtprelay.Accepted {
		var accepted, refused int
		for _, o := range fates {
			if o == smtprelay.Accepted {
				accepted++
			}
		}
		for _, r := range e.Recipients {
			if fates[r.To] != r.Outcome {
				return nil, fmt.Errorf("<%s>: %q by the error, and %q by the receipt", r.To, r.Outcome, fates[r.To])
			}
			if r.Outcome != smtprelay.Accepted {
				refused++
			}
		}
		if accepted == 0 || accepted+refused != len(s.to) {
			return nil, fmt.Errorf("accepted in part: %d of %d accepted, %d refused", accepted, len(s.to), refused)
		}
	}
	for to, o := range fates {
		if e.Outcome == smtprelay.NotAccepted && o != smtprelay.NotAccepted {
			return nil, fmt.Errorf("not accepted, and the receipt says %q for <%s>", o, to)
		}
	}
	return fates, nil
}

// audit compares what the client reported with what the relay has queued: an accepted message is queued once, complete, for each
// accepted recipient; one not accepted is not queued; an unknown one is queued once or not at all. It ignores entries of other
// checks, whose ids do not begin with prefix.
func audit(prefix string, sent []*sending, ledger []entry) error {
	byID := make(map[string][]entry)
	for _, e := range ledger {
		if id := e.header("X-Check"); strings.HasPrefix(id, prefix) {
			byID[id] = append(byID[id], e)
		}
	}
	var errs []error
	report := func(s *sending, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: "+format, append([]any{s.id}, args...)...))
	}
	for _, s := range sent {
		entries := byID[s.id]
		delete(byID, s.id)
		if !s.done {
			report(s, "Send has not returned")
			continue
		}
		fates, err := s.fates()
		if err != nil {
			report(s, "%w", err)
			continue
		}
		copies := make(map[string]int)
		for _, e := range entries {
			for _, to := range e.to {
				copies[to]++
			}
			if e.from != s.from {
				report(s, "the envelope sender arrived as <%s>, not <%s>", e.from, s.from)
			}
			if got := e.body(); got != s.want {
				report(s, "the body arrived as %s, not as %s", short(got), short(s.want))
			}
			if got := e.unfolded("X-SMTPAPI"); got != s.json {
				report(s, "the X-SMTPAPI field arrived as %s, not as %s", short(got), short(s.json))
			}
		}
		for to, o := range fates {
			n := copies[to]
			delete(copies, to)
			switch {
			case o == smtprelay.Accepted && n != 1, o == smtprelay.NotAccepted && n != 0, o == smtprelay.Unknown && n > 1:
				report(s, "the client reported %q for <%s>, but the relay has queued it %d times (error: %v)", o, to, n, s.err)
			}
		}
		for to, n := range copies {
			report(s, "queued %d times for <%s>, which is not a recipient", n, to)
		}
	}
	for id := range byID {
		errs = append(errs, fmt.Errorf("%s is queued, but was never sent", id))
	}
	return first(errs)
}

// header returns the text of a header field on one line.
func (e entry) header(name string) string {
	header, _, _ := bytes.Cut(e.data, []byte("\n\n"))
	for line := range bytes.Lines(header) {
		if rest, ok := bytes.CutPrefix(line, []byte(name+": ")); ok {
			return strings.TrimSpace(string(rest))
		}
	}
	return ""
}

// unfolded returns the text of a header field without folding: each line end and the white space after it removed.
func (e entry) unfolded(name string) string {
	header, _, _ := bytes.Cut(e.data, []byte("\n\n"))
	var text []byte
	inside := false
	for line := range bytes.Lines(header) {
		rest, begins := bytes.CutPrefix(line, []byte(name+": "))
		switch folded := line[0] == ' ' || line[0] == '\t'; {
		case begins:
			inside = true
		case inside && folded:
			rest = bytes.TrimLeft(line, " \t")
		default:
			inside = false
			continue
		}
		text = append(text, bytes.TrimRight(rest, "\n")...)
	}
	return string(text)
}

func (e entry) body() string {
	_, body, _ := bytes.Cut(e.data, []byte("\n\n"))
	return string(body)
}

// short quotes the beginning and the end of a text.
func short(s string) string {
	if len(s) <= 400 {
		return fmt.Sprintf("%q (%d bytes)", s, len(s))
	}
	return fmt.Sprintf("%q … %q (%d bytes)", s[:200], s[len(s)-100:], len(s))
}

// slowBody writes its text in two halves and calls between after the first.
type slowBody struct {
	text    string
	between func() error
}

func (b *slowBody) WriteTo(w io.Writer) (int64, error) {
	half := len(b.text) / 2
	n, err := io.WriteString(w, b.text[:half])
	if err != nil {
		return int64(n), err
	}
	if err := b.between(); err != nil {
		return int64(n), err
	}
	m, err := io.WriteString(w, b.text[half:])
	return int64(n + m), err
}

// bodyOf is a body that identifies its sending in a result of SendAll.
type bodyOf struct {
	io.WriterTo
	of *sending
}

// onlyReader hides everything but Read, so that the size is unknown.
type onlyReader struct{ io.Reader }

// lines returns text of about n bytes, with lines of most lengths that are allowed, and many dots. Haraka breaks lines longer
// than 992 octets, CRLF and dot stuffing included.
func lines(id string, n int) string {
	var b strings.Builder
	for i := 0; b.Len() < n; i++ {
		b.WriteString(strings.Repeat(".", i%3))
		b.WriteString(strings.Repeat("x", i*37%980))
		b.WriteString("\r\n")
	}
	fmt.Fprintf(&b, "The last line of %s.\r\n", id)
	return b.String()
}

// waitFor polls until isTrue returns true or the limit has passed.
func waitFor(limit time.Duration, what string, isTrue func() bool) error {
	for deadline := time.Now().Add(limit); !isTrue(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: not within %v", what, limit)
		}
	}
	return nil
}

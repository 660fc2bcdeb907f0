// The calls of a transcript (`>`), how they end (`<`), and what is checked for each.
package dialogue

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/textproto"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/emersion/go-smtp"

	"github.com/smtprelay/smtprelay"
)

// A call is one use of the client's public interface, running in the background.
type call struct {
	name    string
	kind    string // send, ping, shutdown or close
	message smtprelay.Message
	whole   bool   // the body does not fail
	wire    string // the body as DATA must carry it
	chunks  string // the body as BDAT must carry it
	cancel  context.CancelFunc
	asks    bool // it has a BeforeEnd

	// Guarded by the dialogue's lock.
	asked    int            // times that BeforeEnd was called
	allowed  map[string]int // times that it allowed the end for a recipient
	returned int
	when     int // when it returned, by the dialogue's count of events
	receipt  smtprelay.Receipt
	err      error
	panicked any
	seen     bool // by a < line

	ended chan struct{} // closed when it has returned
}

// begin plays a > line.
func (d *dialogue) begin(s step) error {
	ws := words(s.text)
	var bare []string
	o := settings{values: map[string]string{}}
	for i, w := range ws {
		if i < 2 && w.value == "" && len(bare) == i {
			bare = append(bare, w.key)
			if w.key == "shutdown" || w.key == "close" {
				bare = []string{w.key, w.key}
			}
		} else {
			o.values[w.key] = w.value
		}
	}
	if len(bare) < 2 {
		return s.errorf("want a name and a verb, or a verb")
	}
	d.logf(0, "> %s", s.text)
	if bare[0] == "cancel" {
		c := d.call(bare[1])
		if c == nil {
			return s.errorf("there is no call %q", bare[1])
		}
		c.cancel()
		return nil
	}
	c := &call{name: bare[0], kind: bare[1], ended: make(chan struct{})}
	if d.call(c.name) != nil {
		return s.errorf("there already is a call %q", c.name)
	}
	ctx, cancel := context.WithCancel(context.Background())
	if t := o.duration("timeout"); t != 0 {
		ctx, cancel = context.WithTimeout(context.Background(), t)
	}
	c.cancel = cancel
	var work func() error
	switch c.kind {
	case "send":
		if err := d.compose(c, &o); err != nil {
			return s.errorf("%v", err)
		}
		work = func() error {
			r, err := d.client.Send(ctx, c.message)
			d.mu.Lock()
			defer d.mu.Unlock()
			c.receipt = r
			return err
		}
	case "ping":
		work = func() error { return d.client.Ping(ctx) }
	case "shutdown":
		work = func() error { return d.client.Shutdown(ctx) }
	case "close":
		work = d.client.Close
	default:
		return s.errorf("unknown call %q", c.kind)
	}
	if err := o.rest(); err != nil {
		return s.errorf("%v", err)
	}
	d.mu.Lock()
	for _, b := range d.calls {
		if b.kind == "send" && b.message.From == c.message.From && slices.ContainsFunc(b.message.To, func(to string) bool { return slices.Contains(c.message.To, to) }) {
			d.mu.Unlock()
			return s.errorf("calls %s and %s share the sender and a recipient, so their transactions cannot be distinguished", b.name, c.name)
		}
	}
	d.calls = append(d.calls, c)
	d.played = append(d.played, c.wire)
	d.mu.Unlock()
	go func() { // ends with the call
		defer close(c.ended)
		defer func() {
			d.mu.Lock()
			c.panicked = recover()
			d.mu.Unlock()
		}()
		err := work()
		d.mu.Lock()
		defer d.mu.Unlock()
		c.returned++
		c.err = err
		d.events++
		c.when = d.events
		d.log = append(d.log, fmt.Sprintf("%8s    < %s %s", time.Since(d.began), c.name, c.outcome()))
	}()
	return nil
}

func (d *dialogue) call(name string) *call {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range d.calls {
		if c.name == name {
			return c
		}
	}
	return nil
}

// compose fills in the message of c.
func (d *dialogue) compose(c *call, o *settings) error {
	list := func(v string) []string {
		if v == "" {
			return nil
		}
		return strings.Split(v, ",")
	}
	unescaped := func(key string) string {
		v, err := unescape(o.text(key, ""))
		if err != nil {
			o.err = err
		}
		return v
	}
	m := &c.message
	m.From = unescaped("from")
	m.To = list(unescaped("to"))
	m.To = append(m.To, moreRecipients(o.number("more", 0))...)
	m.AllOrNothing = o.flag("all-or-nothing")
	m.FailFast = o.flag("fail-fast")

	opt := &smtprelay.MailOptions{
		Body:       smtprelay.BodyType(o.text("bodytype", "")),
		Size:       int64(o.number("size", 0)),
		UTF8:       o.flag("smtputf8"),
		Return:     smtprelay.DSNReturn(o.text("ret", "")),
		EnvelopeID: o.text("envid", ""),
		RequireTLS: o.flag("requiretls"),
	}
	if v, ok := o.take("auth"); ok {
		opt.Auth = &v
	}
	if t := o.duration("by"); t != 0 {
		opt.DeliverBy = &smtprelay.DeliverBy{Time: t, Mode: smtprelay.DeliverByReturn}
	}
	if v := o.number("priority", 0); v != 0 {
		opt.Priority = &v
	}
	if *opt != (smtprelay.MailOptions{}) {
		m.MailOptions = opt
	}
	rcpt := &smtprelay.RcptOptions{}
	for _, v := range list(o.text("notify", "")) {
		rcpt.Notify = append(rcpt.Notify, smtprelay.DSNNotify(v))
	}
	if v, ok := o.take("orcpt"); ok {
		rcpt.OriginalRecipientType, rcpt.OriginalRecipient = smtprelay.DSNAddressTypeRFC822, v
	}
	if o.flag("rrvs") {
		rcpt.RequireRecipientValidSince = time.Unix(1_700_000_000, 0)
	}
	if !reflect.DeepEqual(*rcpt, smtprelay.RcptOptions{}) {
		m.RcptOptions = map[string]*smtprelay.RcptOptions{}
		for _, to := range m.To {
			m.RcptOptions[to] = rcpt
		}
	}

	text, err := d.script.body(o.text("body", c.name))
	if err != nil {
		return err
	}
	b := &testBody{text: text, failAt: o.number("fail-at", -1), short: o.number("short", -1), pieces: o.number("pieces", 0)}
	c.wire, c.chunks = onTheWire(text), canonical(text)
	c.whole = text != "" && b.failAt < 0 && b.short < 0
	switch {
	case b.failAt >= 0 || b.short >= 0:
		m.Body = b
	case o.flag("writer") || b.pieces > 0:
		m.Body = b
	case o.flag("reader"):
		m.Body = smtprelay.Reader(struct{ io.Reader }{strings.NewReader(text)})
	default:
		m.Body = smtprelay.Bytes([]byte(text))
	}
	if v, ok := o.take("before-end"); ok {
		c.asks, c.allowed = true, map[string]int{}
		m.BeforeEnd = d.beforeEnd(c, v)
	}
	return o.err
}

var errBeforeEnd = errors.New("the intent cannot be written")

// beforeEnd is the BeforeEnd of c: "" says yes; "fail" says no, "fail-at-2" the second time; "wait" waits until its context ends,
// and "30s" waits this long before it says yes.
func (d *dialogue) beforeEnd(c *call, how string) func(context.Context, []string) error {
	return func(ctx context.Context, to []string) error {
		d.mu.Lock()
		c.asked++
		n := c.asked
		d.log = append(d.log, fmt.Sprintf("%8s    ? %s %d", time.Since(d.began), c.name, n))
		d.mu.Unlock()
		if how == "fail" || how == fmt.Sprintf("fail-at-%d", n) {
			return errBeforeEnd
		}
		var elapsed <-chan time.Time
		if how == "wait" {
			elapsed = make(chan time.Time)
		} else if wait, err := time.ParseDuration(how); err == nil {
			elapsed = time.After(wait)
		}
		if elapsed != nil {
			select {
			case <-elapsed:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		for _, to := range to {
			c.allowed[to]++
		}
		return nil
	}
}

var errBody = errors.New("the template failed")

// testBody is a body whose size the client cannot know, and which can fail.
type testBody struct {
	text   string
	failAt int // octets after which writing fails; negative: never
	short  int // octets after which writing stops, and claims success; negative: never
	pieces int // octets of each write; 0: all in one
}

func (b *testBody) WriteTo(w io.Writer) (int64, error) {
	if b.failAt >= 0 {
		n, err := io.WriteString(w, b.text[:b.failAt])
		if err == nil {
			err = errBody
		}
		return int64(n), err
	}
	if b.short >= 0 {
		_, err := io.WriteString(w, b.text[:b.short])
		return int64(len(b.text)), err
	}
	for i := 0; b.pieces > 0 && i < len(b.text); i += b.pieces {
		n, err := io.WriteString(w, b.text[i:min(i+b.pieces, len(b.text))])
		if err != nil {
			return int64(i + n), err
		}
	}
	if b.pieces > 0 {
		return int64(len(b.text)), nil
	}
	n, err := io.WriteString(w, b.text)
	return int64(n), err
}

// outcome is the text of a < line for the call.
func (c *call) outcome() string {
	if c.kind != "send" {
		if c.err == nil {
			return "ok"
		}
		return fmt.Sprintf("failed (%v)", c.err)
	}
	if c.err == nil {
		return fmt.Sprintf("accepted %d", c.receipt.Reply.Code)
	}
	e, ok := errors.AsType[*smtprelay.Error](c.err)
	if !ok {
		return fmt.Sprintf("with an error that is not an *Error: %v", c.err)
	}
	word := map[smtprelay.Outcome]string{
		smtprelay.Accepted: "accepted", smtprelay.NotAccepted: "refused", smtprelay.Unknown: "unknown",
	}[e.Outcome]
	if code := c.code(); code != 0 {
		word += " " + strconv.Itoa(code)
	}
	return fmt.Sprintf("%s (%v)", word, c.err)
}

// code is the code of the reply that decided the outcome.
func (c *call) code() int {
	if e, ok := errors.AsType[*smtprelay.Error](c.err); ok && e.Outcome != smtprelay.Accepted {
		return e.Reply.Code
	}
	return c.receipt.Reply.Code
}

// unseen returns an error if a call has ended without a < line.
func (d *dialogue) unseen(s step) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range d.calls {
		if c.panicked != nil {
			return s.errorf("call %s panicked: %v", c.name, c.panicked)
		}
		if c.returned > 0 && !c.seen {
			return s.errorf("before this line call %s ended: %s", c.name, c.outcome())
		}
		if c.returned == 0 && strings.HasPrefix(s.text, "(end") {
			return s.errorf("call %s has not ended", c.name)
		}
	}
	return nil
}

// ended plays a < line.
func (d *dialogue) ended(s step) error {
	ws := words(s.text)
	if len(ws) < 2 {
		return s.errorf("want a name and an outcome")
	}
	c := d.call(ws[0].key)
	if c == nil {
		return s.errorf("there is no call %q", ws[0].key)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if c.returned == 0 {
		return s.errorf("call %s has not ended", c.name)
	}
	if c.seen {
		return s.errorf("call %s had already ended", c.name)
	}
	c.seen = true
	if err := c.check(ws[1:]); err != nil {
		return s.errorf("%v; it ended: %s", err, c.outcome())
	}
	return nil
}

// check compares how c ended with the words of a < line.
func (c *call) check(ws []word) error {
	got, _, _ := strings.Cut(c.outcome(), " ")
	if got != ws[0].key {
		return fmt.Errorf("not %s", ws[0].key)
	}
	e, _ := errors.AsType[*smtprelay.Error](c.err)
	code, refused, text := 0, "", fmt.Sprint(c.err)
	if c.err == nil {
		text = c.receipt.Reply.Message
	} else {
		if e != nil {
			var names []string
			for _, r := range e.Recipients {
				if r.Outcome != smtprelay.Accepted {
					names = append(names, r.To)
				}
			}
			refused = strings.Join(names, ",")
		}
	}
	wantRefused := ""
	is := func(err error) error {
		if !errors.Is(c.err, err) {
			return fmt.Errorf("errors.Is does not find %v", err)
		}
		return nil
	}
	for _, w := range ws[1:] {
		var err error
		bad := false
		switch w.key {
		case "temporary":
			bad = e == nil || !e.Temporary()
		case "permanent":
			bad = e == nil || e.Temporary()
		case "timeout":
			bad = e == nil || !e.Timeout()
		case "closed":
			err = is(smtprelay.ErrClosed)
		case "canceled":
			err = is(context.Canceled)
		case "deadline":
			err = is(context.DeadlineExceeded)
		case "body-failed":
			err = is(errBody)
		case "kept-back":
			err = is(errBeforeEnd)
		case "asked":
			bad = strconv.Itoa(c.asked) != w.value
		case "op":
			bad = e == nil || string(e.Op) != w.value
		case "text":
			bad = !strings.Contains(text, w.value)
		case "enhanced":
			enhanced := c.receipt.Reply.EnhancedCode
			if e != nil && e.Outcome != smtprelay.Accepted {
				enhanced = e.Reply.EnhancedCode
			}
			bad = fmt.Sprintf("%d.%d.%d", enhanced[0], enhanced[1], enhanced[2]) != w.value
		case "again":
			bad = strings.Join(smtprelay.RetryTo(c.err), ",") != w.value
		case "scope":
			bad = e == nil || e.Scope.String() != w.value
		case "refused":
			wantRefused = w.value
		case "queued":
			bad = c.receipt.QueueID != w.value
		case "attempts":
			bad = e == nil || strconv.Itoa(e.Attempts) != w.value
		case "rcpt": // rcpt=b@y.example:250
			bad = !slices.ContainsFunc(c.receipt.Recipients, func(r smtprelay.RecipientResult) bool {
				return fmt.Sprintf("%s:%d", r.To, r.Reply.Code) == w.value
			})
		default:
			if n, convErr := strconv.Atoi(w.key); convErr == nil && w.value == "" {
				code = n
			} else {
				err = fmt.Errorf("unknown word %q", w.key)
			}
		}
		if bad {
			err = fmt.Errorf("not %s", strings.TrimSuffix(w.key+"="+w.value, "="))
		}
		if err != nil {
			return err
		}
	}
	if c.code() != code {
		return fmt.Errorf("code %d, not %d", c.code(), code)
	}
	if refused != wantRefused && (got == "accepted" || wantRefused != "") {
		return fmt.Errorf("refused=%s, not refused=%s", refused, wantRefused)
	}
	return c.consistent()
}

// consistent checks what must hold for every result, whatever the script.
func (c *call) consistent() error {
	if c.err == nil {
		if c.kind != "send" {
			return nil
		}
		if c.receipt.Reply.Code/100 != 2 {
			return fmt.Errorf("accepted, but the receipt has code %d", c.receipt.Reply.Code)
		}
		if len(c.receipt.Recipients) != len(c.message.To) {
			return fmt.Errorf("the receipt has %d recipients, not %d", len(c.receipt.Recipients), len(c.message.To))
		}
		for i, r := range c.receipt.Recipients {
			if r.To != c.message.To[i] || r.Outcome != smtprelay.Accepted || r.Reply.Code/100 != 2 {
				return fmt.Errorf("no error, but recipient %d is %+v", i+1, r)
			}
		}
		return nil
	}
	if c.kind == "shutdown" {
		return nil // the context's own error
	}
	e, ok := errors.AsType[*smtprelay.Error](c.err)
	if !ok {
		return errors.New("the error is not an *Error")
	}
	if got := smtprelay.OutcomeOf(c.err); got != e.Outcome {
		return fmt.Errorf("OutcomeOf is %v, but the error's outcome %v", got, e.Outcome)
	}
	if _, ok := errors.AsType[net.Error](c.err); !ok {
		return errors.New("errors.As finds no net.Error")
	}
	if e.Reply.Code != 0 {
		if p, ok := errors.AsType[*textproto.Error](c.err); !ok || p.Code != e.Reply.Code {
			return fmt.Errorf("errors.As finds the *textproto.Error %v", p)
		}
		if p, ok := errors.AsType[*smtp.SMTPError](c.err); !ok || p.Code != e.Reply.Code {
			return fmt.Errorf("errors.As finds the *smtp.SMTPError %v", p)
		}
	}
	if c.kind == "send" {
		return consistentRecipients(e, c.message.To)
	}
	return nil
}

// consistentRecipients checks that e has each recipient of to, and that its outcome as a whole matches theirs.
func consistentRecipients(e *smtprelay.Error, to []string) error {
	if len(e.Recipients) != len(to) {
		return fmt.Errorf("the error has %d recipients, not %d", len(e.Recipients), len(to))
	}
	had := make(map[smtprelay.Outcome]bool)
	for i, r := range e.Recipients {
		if r.To != to[i] {
			return fmt.Errorf("recipient %d is %s, not %s", i+1, r.To, to[i])
		}
		had[r.Outcome] = true
	}
	fits := false
	switch e.Outcome {
	case smtprelay.Accepted:
		fits = had[smtprelay.Accepted] && had[smtprelay.NotAccepted] && !had[smtprelay.Unknown]
	case smtprelay.Unknown:
		fits = had[smtprelay.Unknown]
	case smtprelay.NotAccepted:
		fits = !had[smtprelay.Accepted] && !had[smtprelay.Unknown]
	}
	switch again := smtprelay.RetryTo(e); {
	case !fits && len(to) > 0:
		return fmt.Errorf("the outcome is %v, but the recipients are %v", e.Outcome, e.Recipients)
	case e.Scope == smtprelay.ScopeUnknown:
		return errors.New("the scope is unknown")
	case smtprelay.ShouldRetry(e) && (e.Outcome != smtprelay.NotAccepted || len(again) == 0):
		return fmt.Errorf("ShouldRetry is true, but the outcome is %v and RetryTo %v", e.Outcome, again)
	case e.Temporary() && e.Outcome != smtprelay.NotAccepted:
		return fmt.Errorf("temporary, but the outcome is %v", e.Outcome)
	}
	return nil
}

package devrelay

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/smtprelay/smtprelay/smtptest"
)

// maxFaults is how many faults there may be at once: every command meets each of them.
const maxFaults = 100

// FaultSpec is a smtptest.Fault in words: At is one of the names that Steps returns. Count 0 means until it is switched off.
type FaultSpec struct {
	At              string  `json:"at"`
	Reply           string  `json:"reply,omitempty"` // lines are separated by "\n"
	Drop            bool    `json:"drop,omitempty"`
	Abort           bool    `json:"abort,omitempty"`
	Stall           bool    `json:"stall,omitempty"`
	Discard         bool    `json:"discard,omitempty"`
	Delay           string  `json:"delay,omitempty"` // as time.ParseDuration reads it
	Connection      int     `json:"connection,omitempty"`
	Rcpt            string  `json:"rcpt,omitempty"`
	AfterBytes      int64   `json:"after_bytes,omitempty"`
	AfterMessages   int     `json:"after_messages,omitempty"`
	AfterRecipients int     `json:"after_recipients,omitempty"`
	Pipelined       bool    `json:"pipelined,omitempty"`
	Nth             int     `json:"nth,omitempty"`
	Every           int     `json:"every,omitempty"`
	Rate            float64 `json:"rate,omitempty"` // events a second that are spared
	Burst           int     `json:"burst,omitempty"`
	Count           int     `json:"count,omitempty"`
}

// A step is a point of the dialogue by the name that users give it.
type step struct {
	name string
	at   smtptest.Step
}

var faultSteps = []step{
	{"connect", smtptest.Connect}, {"ehlo", smtptest.EHLO}, {"starttls", smtptest.StartTLS}, {"tls", smtptest.TLSHandshake},
	{"auth", smtptest.Auth}, {"auth-response", smtptest.AuthResponse}, {"mail", smtptest.Mail}, {"rcpt", smtptest.Rcpt},
	{"data", smtptest.Data}, {"body", smtptest.Body}, {"dot", smtptest.FinalDot}, {"accepted", smtptest.Accepted},
	{"bdat", smtptest.Bdat}, {"rset", smtptest.Rset}, {"noop", smtptest.Noop}, {"quit", smtptest.Quit}, {"other", smtptest.Other},
	{"idle", smtptest.Idle}, {"any", 0},
}

// Steps returns the names of the steps at which a fault can strike, in the order of a dialogue.
func Steps() []string {
	names := make([]string, len(faultSteps))
	for i, s := range faultSteps {
		names[i] = s.name
	}
	return names
}

// faultOptions are the words after the step: a flag, or a value. The text form of a FaultSpec is made and read by this table.
var faultOptions = []struct {
	name  string
	field func(*FaultSpec) any
}{
	{"delay", func(f *FaultSpec) any { return &f.Delay }},
	{"stall", func(f *FaultSpec) any { return &f.Stall }},
	{"drop", func(f *FaultSpec) any { return &f.Drop }},
	{"abort", func(f *FaultSpec) any { return &f.Abort }},
	{"discard", func(f *FaultSpec) any { return &f.Discard }},
	{"connection", func(f *FaultSpec) any { return &f.Connection }},
	{"rcpt", func(f *FaultSpec) any { return &f.Rcpt }},
	{"after-bytes", func(f *FaultSpec) any { return &f.AfterBytes }},
	{"after-messages", func(f *FaultSpec) any { return &f.AfterMessages }},
	{"after-recipients", func(f *FaultSpec) any { return &f.AfterRecipients }},
	{"pipelined", func(f *FaultSpec) any { return &f.Pipelined }},
	{"nth", func(f *FaultSpec) any { return &f.Nth }},
	{"every", func(f *FaultSpec) any { return &f.Every }},
	{"rate", func(f *FaultSpec) any { return &f.Rate }},
	{"burst", func(f *FaultSpec) any { return &f.Burst }},
	{"count", func(f *FaultSpec) any { return &f.Count }},
}

// ParseFault reads a fault such as "rcpt=450 4.2.1 later; rcpt=bob@example.org; count=3": a step, and after it a reply or
// options, separated by semicolons.
func ParseFault(text string) (FaultSpec, error) {
	at, rest, ok := strings.Cut(text, "=")
	if !ok || strings.Contains(at, ";") {
		return FaultSpec{}, errors.New("want STEP=REPLY or STEP=OPTION, such as rcpt=450 4.2.1 later, dot=drop, or mail=delay=2s")
	}
	f := FaultSpec{At: strings.ToLower(strings.TrimSpace(at))}
	for n, part := range strings.Split(rest, ";") {
		part = strings.TrimSpace(part)
		name, value, _ := strings.Cut(part, "=")
		switch done, err := f.set(strings.ToLower(strings.TrimSpace(name)), strings.TrimSpace(value)); {
		case err != nil:
			return FaultSpec{}, err
		case done:
		case n == 0 && part != "" && '0' <= part[0] && part[0] <= '9':
			f.Reply = part
		default:
			return FaultSpec{}, fmt.Errorf("%q is no reply, and no option such as drop, stall, delay=2s, nth=3 or count=1", part)
		}
	}
	return f, f.check()
}

// set sets an option, and reports whether there is one with the name.
func (f *FaultSpec) set(name, value string) (done bool, err error) {
	for _, o := range faultOptions {
		if o.name != name {
			continue
		}
		switch p := o.field(f).(type) {
		case *bool:
			*p = true
			if value != "" {
				*p, err = strconv.ParseBool(value)
			}
		case *string:
			*p = value
		case *int:
			*p, err = strconv.Atoi(value)
		case *int64:
			*p, err = strconv.ParseInt(value, 10, 64)
		case *float64:
			*p, err = strconv.ParseFloat(value, 64)
		}
		if err != nil {
			err = fmt.Errorf("%s=%s: not a value of it", name, value)
		}
		return true, err
	}
	return false, nil
}

// String returns the fault in the form that ParseFault reads.
func (f FaultSpec) String() string {
	var parts []string
	if f.Reply != "" {
		parts = append(parts, f.Reply)
	}
	for _, o := range faultOptions {
		switch p := o.field(&f).(type) {
		case *bool:
			if *p {
				parts = append(parts, o.name)
			}
		case *string:
			if *p != "" {
				parts = append(parts, o.name+"="+*p)
			}
		case *int:
			if *p != 0 {
				parts = append(parts, o.name+"="+strconv.Itoa(*p))
			}
		case *int64:
			if *p != 0 {
				parts = append(parts, o.name+"="+strconv.FormatInt(*p, 10))
			}
		case *float64:
			if *p != 0 {
				parts = append(parts, o.name+"="+strconv.FormatFloat(*p, 'g', -1, 64))
			}
		}
	}
	return f.At + "=" + strings.Join(parts, "; ")
}

// replyLine is a line of a reply that a client can read (RFC 5321, 4.2).
var replyLine = regexp.MustCompile(`^[2-5][0-9]{2}([ -][^\x00-\x08\x0a-\x1f\x7f]*)?$`)

// check returns what is wrong.
func (f *FaultSpec) check() error {
	if _, err := f.step(); err != nil {
		return err
	}
	delay, err := f.delay()
	switch {
	case err != nil || delay < 0 || delay > 24*time.Hour:
		return fmt.Errorf("delay %q: want a time such as 2s, at most 24h", f.Delay)
	case f.Connection < 0 || f.AfterBytes < 0 || f.AfterMessages < 0 || f.AfterRecipients < 0 || f.Nth < 0 || f.Every < 0 || f.Burst < 0 || f.Count < 0:
		return errors.New("a number is negative")
	case !(f.Rate >= 0 && f.Rate <= 1e6):
		return fmt.Errorf("rate %v: want 0 to 1000000 a second", f.Rate)
	case len(f.Reply) > 4096 || len(f.Rcpt) > 1000:
		return errors.New("the reply or the recipient is too long")
	case f.Reply == "" && !f.Drop && !f.Abort && !f.Stall && !f.Discard && delay == 0:
		return errors.New("the fault does nothing: give it a reply, drop, abort, stall, discard or a delay")
	}
	return f.checkReply()
}

func (f *FaultSpec) checkReply() error {
	if f.Reply == "" {
		return nil
	}
	lines := strings.Split(f.Reply, "\n")
	for i, line := range lines {
		if !replyLine.MatchString(line) {
			return fmt.Errorf("%q is no reply: want a code of three digits and a text, such as 450 4.2.1 later", line)
		}
		if last := i == len(lines)-1; line[:3] != lines[0][:3] || last == (len(line) > 3 && line[3] == '-') {
			return fmt.Errorf(`the lines of a reply have one code, with "-" after it in all but the last: %q`, line)
		}
	}
	return nil
}

func (f *FaultSpec) step() (smtptest.Step, error) {
	i := slices.IndexFunc(faultSteps, func(s step) bool { return s.name == f.At })
	if i < 0 {
		return 0, fmt.Errorf("%q is no step: want one of %s", f.At, strings.Join(Steps(), ", "))
	}
	return faultSteps[i].at, nil
}

func (f *FaultSpec) delay() (time.Duration, error) {
	if f.Delay == "" {
		return 0, nil
	}
	return time.ParseDuration(f.Delay)
}

// fault returns what smtptest understands. hits is how often it has struck already. The FaultSpec has been checked.
func (f *FaultSpec) fault(hits int) smtptest.Fault {
	at, _ := f.step()
	delay, _ := f.delay()
	count := -1
	if f.Count > 0 {
		count = f.Count - hits
	}
	return smtptest.Fault{
		At: at, Conn: f.Connection, Rcpt: f.Rcpt, AfterBytes: f.AfterBytes, AfterMessages: f.AfterMessages, AfterRecipients: f.AfterRecipients,
		Pipelined: f.Pipelined, Nth: f.Nth, Every: f.Every, Rate: f.Rate, Burst: f.Burst,
		Delay: delay, Stall: f.Stall, Reply: f.Reply, Drop: f.Drop, Abort: f.Abort, Discard: f.Discard, Count: count,
	}
}

// Fault is a fault that was set, and what has become of it.
type Fault struct {
	ID   int    `json:"id"`
	Text string `json:"text"` // as ParseFault reads it
	On   bool   `json:"on"`   // false where it was switched off, or has struck as often as it should
	Hits int    `json:"hits"` // how often it has struck
	FaultSpec
}

// faultSet is the faults of a relay, on and off.
type faultSet struct {
	smtp    *smtptest.Server
	changed func()

	mu     sync.Mutex // guards the fields below
	lastID int
	list   []*liveFault
	rev    uint64
}

type liveFault struct {
	id     int
	spec   FaultSpec
	handle *smtptest.FaultHandle // nil while it is off
	before int                   // hits of earlier handles
}

func newFaultSet(s *smtptest.Server, changed func()) *faultSet {
	return &faultSet{smtp: s, changed: changed}
}

func (l *liveFault) hits() int {
	if l.handle == nil {
		return l.before
	}
	return l.before + l.handle.Hits()
}

func (l *liveFault) spent() bool { return l.spec.Count > 0 && l.hits() >= l.spec.Count }

func (l *liveFault) show() Fault {
	return Fault{ID: l.id, Text: l.spec.String(), On: l.handle != nil && !l.spent(), Hits: l.hits(), FaultSpec: l.spec}
}

// add sets a fault that was checked, and switches it on.
func (s *faultSet) add(spec FaultSpec) (Fault, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.list) >= maxFaults {
		return Fault{}, fmt.Errorf("there are %d faults already: delete one", maxFaults)
	}
	s.lastID++
	l := &liveFault{id: s.lastID, spec: spec, handle: s.smtp.Fault(spec.fault(0))}
	s.list = append(s.list, l)
	s.touchLocked()
	return l.show(), nil
}

func (s *faultSet) touchLocked() {
	s.rev++
	s.changed()
}

func (s *faultSet) findLocked(id int) *liveFault {
	for _, l := range s.list {
		if l.id == id {
			return l
		}
	}
	return nil
}

// turn switches a fault on or off. One that is spent begins anew. ok is false if there is none with the id.
func (s *faultSet) turn(id int, on bool) (f Fault, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.findLocked(id)
	if l == nil {
		return Fault{}, false
	}
	if on && l.spent() {
		l.stop()
		l.before = 0
	}
	switch {
	case on && l.handle == nil:
		l.handle = s.smtp.Fault(l.spec.fault(l.before))
	case !on:
		l.stop()
	}
	s.touchLocked()
	return l.show(), true
}

func (l *liveFault) stop() {
	if l.handle != nil {
		l.handle.Remove()
		l.before += l.handle.Hits()
		l.handle = nil
	}
}

// remove deletes the fault with the id, or all where id is 0, and returns how many.
func (s *faultSet) remove(id int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := len(s.list)
	s.list = slices.DeleteFunc(s.list, func(l *liveFault) bool {
		if id != 0 && l.id != id {
			return false
		}
		l.stop()
		return true
	})
	s.touchLocked()
	return before - len(s.list)
}

// all returns all faults, in the order in which they were set.
func (s *faultSet) all() []Fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := []Fault{}
	for _, l := range s.list {
		list = append(list, l.show())
	}
	return list
}

// get returns the fault with the id.
func (s *faultSet) get(id int) (Fault, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.findLocked(id)
	if l == nil {
		return Fault{}, false
	}
	return l.show(), true
}

// wait waits until a fault that is on has struck n times in all. It returns false if there is none with the id, or it is off
// and has not struck so often.
func (s *faultSet) wait(ctx context.Context, id, n int) (Fault, bool, error) {
	s.mu.Lock()
	l := s.findLocked(id)
	if l == nil {
		s.mu.Unlock()
		return Fault{}, false, nil
	}
	handle, before := l.handle, l.before
	s.mu.Unlock()
	var err error
	if handle != nil {
		err = handle.Wait(ctx, n-before)
	}
	f, ok := s.get(id)
	return f, ok, err
}

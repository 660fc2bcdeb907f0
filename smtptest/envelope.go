package smtptest

import (
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/smtprelay/smtprelay"
)

// envelope is what a transaction has collected. go-smtp's goroutine fills it in.
type envelope struct {
	open        bool // MAIL was accepted
	refused     bool // something was refused since: the client may have abandoned the transaction
	from        string
	to          []string
	mailOptions smtprelay.MailOptions
	rcptOptions []smtprelay.RcptOptions
	chunks      int // BDAT commands so far
}

// mail executes MAIL.
func (c *conn) mail(line, arg string) ending {
	s := c.s
	turns := c.wire.turns.Load()
	s.mu.Lock()
	if c.stats.Mails++; c.stats.Mails == 1 {
		c.turnsBefore = max(0, int(turns)-1)
	}
	if c.finalTurns == turns {
		c.stats.Overlapped++
	}
	tooMany := s.MaxMessages > 0 && c.stats.Mails > s.MaxMessages
	s.mu.Unlock()
	c.finalTurns = -1

	c.path = path(arg)
	b := c.meet(Event{Step: Mail, Line: line, From: c.path})
	if tooMany && !b.refuses() {
		s.mu.Lock()
		s.refused++
		s.mu.Unlock()
		c.say("421 4.7.0 Too many messages in this connection")
		return hangUp
	}
	return c.answer(b, func() string {
		command, params := c.cutPath(line)
		params, size, tooBig := bigSize(params, s.MaxSize)
		if tooBig {
			return "552 5.3.4 Max message size exceeded"
		}
		if c.env.open { // go-smtp accepts a second one
			return "503 5.5.1 Sender already given"
		}
		params, urgency := c.cutUrgency(params)
		c.ours = smtprelay.MailOptions{Size: size}
		for _, field := range urgency {
			if !readUrgency(&c.ours, field) {
				return "501 5.5.4 Malformed parameter " + field
			}
		}
		return c.askAbout(command+params, "250 Sender address accepted")
	})
}

// cutPath splits a MAIL or RCPT command after c.path, which may contain spaces and equals signs.
func (c *conn) cutPath(line string) (command, params string) {
	end := strings.Index(line, c.path) + len(c.path)
	return line[:end], line[end:]
}

// bigSize removes SIZE= from the parameters of MAIL if it does not fit into go-smtp's 32 bits.
func bigSize(params string, limit int64) (string, int64, bool) {
	for field := range strings.FieldsSeq(params) {
		if len(field) < 5 || !strings.EqualFold(field[:5], "SIZE=") {
			continue
		}
		if n, err := strconv.ParseInt(field[5:], 10, 64); err == nil && n >= 1<<32 {
			return strings.Replace(params, " "+field, "", 1), n, limit > 0 && n > limit
		}
	}
	return params, 0, false
}

// cutUrgency removes BY= and MT-PRIORITY= from the parameters if they are offered. They belong to MAIL (RFC 2852, 4; RFC 6710,
// 3); go-smtp before 0.26 read them after RCPT.
func (c *conn) cutUrgency(params string) (rest string, urgency []string) {
	rest = params
	for field := range strings.FieldsSeq(params) {
		keyword, _, _ := strings.Cut(strings.ToUpper(field), "=")
		if keyword == "BY" && c.s.offers("DELIVERBY") || keyword == "MT-PRIORITY" && c.s.offers("MT-PRIORITY") {
			rest = strings.Replace(rest, " "+field, "", 1)
			urgency = append(urgency, field)
		}
	}
	return rest, urgency
}

var (
	byParam       = regexp.MustCompile(`^(?i:BY)=([-+]?[0-9]{1,9});([NRnr])([Tt]?)$`)
	priorityParam = regexp.MustCompile(`^(?i:MT-PRIORITY)=(0|-?[1-9])$`)
)

// readUrgency reads a parameter that cutUrgency has found into o. It reports false if the parameter is malformed.
func readUrgency(o *smtprelay.MailOptions, field string) bool {
	if m := priorityParam.FindStringSubmatch(field); m != nil {
		n, _ := strconv.Atoi(m[1])
		o.Priority = &n
		return true
	}
	m := byParam.FindStringSubmatch(field)
	if m == nil {
		return false
	}
	seconds, _ := strconv.Atoi(m[1])
	o.DeliverBy = &smtprelay.DeliverBy{
		Time:  time.Duration(seconds) * time.Second,
		Mode:  smtprelay.DeliverByMode(strings.ToUpper(m[2])),
		Trace: m[3] != "",
	}
	return o.DeliverBy.Mode == smtprelay.DeliverByNotify || seconds > 0 // BY=0;R or less: a deadline that has passed cannot be met
}

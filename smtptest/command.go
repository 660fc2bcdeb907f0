package smtptest

import "strings"

// commands are the verbs that the relay knows.
var commands = map[string]Step{
	"EHLO": EHLO, "HELO": EHLO, "STARTTLS": StartTLS, "AUTH": Auth, "MAIL": Mail, "RCPT": Rcpt, "DATA": Data, "BDAT": Bdat,
	"RSET": Rset, "NOOP": Noop, "QUIT": Quit, "VRFY": Other, "EXPN": Other, "HELP": Other,
}

// rcpt executes RCPT.
func (c *conn) rcpt(line, arg string) ending {
	c.path = path(arg)
	return c.answer(c.meet(Event{Step: Rcpt, Line: line, Rcpt: c.path}), func() string {
		_, params := c.cutPath(line)
		if _, misplaced := c.cutUrgency(params); len(misplaced) > 0 {
			return "555 5.5.4 Not a parameter of RCPT: " + misplaced[0]
		}
		return c.askAbout(line, "250 Recipient address accepted")
	})
}

// do executes a command.
func (c *conn) do(line string) ending {
	line = strings.TrimRight(line, " \t")
	verb, arg, _ := strings.Cut(line, " ")
	verb = strings.ToUpper(verb)
	step, known := commands[verb]
	if !known {
		step, verb = Other, ""
	}
	c.log("C", redact(line))
	c.count(verb)
	if strings.ContainsAny(line, "\r\x00") {
		c.say("500 5.5.2 Bare CR or NUL in a command")
		return goOn
	}
	if !c.s.pipelining && step != Bdat && c.crowded() {
		c.say("500 5.5.1 Invalid command: Pipelining not supported")
		return hangUp
	}

	switch step {
	case EHLO:
		if c.crowded() { // RFC 2920, 3.1: these commands are the last of their group
			c.say("554 5.5.0 SMTP protocol error: nothing may follow " + verb + " before its reply")
			return hangUp
		}
		return c.answer(c.meet(Event{Step: EHLO, Line: line}), func() string { return c.greet(verb, line) })
	case StartTLS:
		return c.startTLS(line)
	case Auth:
		return c.auth(line)
	case Mail:
		return c.mail(line, arg)
	case Rcpt:
		return c.rcpt(line, arg)
	case Data:
		return c.data(line)
	case Bdat:
		return c.bdat(line, arg)
	case Quit:
		end := c.answer(c.meet(Event{Step: Quit, Line: line}), func() string { return "221 See you later" })
		return max(end, hangUp)
	}
	return c.answer(c.meet(Event{Step: step, Line: line}), func() string {
		if !known {
			return "500 5.5.2 Command not recognized"
		}
		if step == Rset && c.s.KeepEnvelopeOnRset && c.env.open {
			c.env.chunks = 0
			return "250 2.0.0 Session reset"
		}
		reply := c.ask(line)
		if step == Rset {
			c.env = envelope{}
		}
		return reply
	})
}

// crowded reports whether more has arrived after a command that must be the last of its group. With KeepRefusedChunks it reports
// false: the text of a chunk read as commands does not wait for replies.
func (c *conn) crowded() bool { return c.br.Buffered() > 0 && !c.s.KeepRefusedChunks }

// count counts a command.
func (c *conn) count(verb string) {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.stats.Commands[verb]++
	if verb == "AUTH" {
		c.stats.Auths++
	}
}

// redact returns a command line without the secrets that AUTH carries.
func redact(line string) string {
	if f := strings.SplitN(line, " ", 3); len(f) == 3 && strings.EqualFold(f[0], "AUTH") {
		return f[0] + " " + f[1] + " [redacted]"
	}
	return line
}

// path returns the path of a MAIL or RCPT command as written between its brackets.
func path(arg string) string {
	_, p, _ := strings.Cut(arg, ":")
	p = strings.TrimLeft(p, " ")
	if !strings.HasPrefix(p, "<") {
		p, _, _ = strings.Cut(p, " ")
		return p
	}
	quoted := false
	for i := 1; i < len(p); i++ {
		switch {
		case p[i] == '\\' && quoted:
			i++
		case p[i] == '"':
			quoted = !quoted
		case p[i] == '>' && !quoted:
			return p[1:i]
		}
	}
	return p[1:]
}

// greet executes EHLO or HELO.
func (c *conn) greet(verb, line string) string {
	reply := c.ask(line)
	if !positive(reply) {
		return reply
	}
	c.env = envelope{}
	if verb == "HELO" {
		return "250 " + c.s.Name
	}
	lines := append([]string{c.s.Name}, c.s.ehlo...)
	if c.canStartTLS() {
		lines = append(lines, "STARTTLS")
	}
	if !c.s.NoAuth && !c.canStartTLS() && len(c.s.Mechanisms) > 0 {
		mechanisms := strings.Join(c.s.Mechanisms, " ")
		lines = append(lines, "AUTH "+mechanisms, "AUTH="+mechanisms) // the second is for clients older than RFC 2554
	}
	return "250-" + strings.Join(lines[:len(lines)-1], "\n250-") + "\n250 " + lines[len(lines)-1]
}

// askAbout asks go-smtp about c.path, unless Reject has it, and replies in SendGrid's words if go-smtp accepts.
func (c *conn) askAbout(line, accepted string) string {
	if reply, ok := c.s.Reject[strings.ToLower(c.path)]; ok {
		return reply
	}
	if c.env.chunks > 0 {
		return underWay
	}
	reply := c.ask(line)
	if positive(reply) {
		return accepted
	}
	return reply
}

// underWay is the reply to commands that are not allowed between the chunks of a message.
const underWay = "503 5.5.1 A message is in progress"

package smtpapi

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// What SendGrid's pages allow.
const (
	maxTo            = 10_000         // addresses (Building an X-SMTPAPI Header, Limitations)
	maxSubBytes      = 50_000         // bytes of one recipient's substitutions (Substitution Tags; it said 10,000 in 2021)
	maxNesting       = 4              // substitutions in each other (Substitution Tags)
	maxCategories    = 10             // categories of a message (Categories, Limitations)
	maxUniqueArgs    = 10_000         // bytes of all arguments (Unique Arguments)
	maxAhead         = 72 * time.Hour // of send_at and send_each_at (Scheduling Parameters)
	maxGroupsDisplay = 25             // asm_groups_to_display (Suppression Groups)
)

const tooLong = "longer than 996 octets in quotes and escaped, which no line holds, and a string cannot be folded: " +
	"put the text into the message or a template"

// Check reports every mistake in h: what SendGrid's pages forbid, and what cannot be written as a header field. The mistakes
// are joined as by [errors.Join], one to a line; where several entries of a list have the same one, the first is named
// and the others are counted. It reads the clock, for SendAt and SendEachAt.
func (h Header) Check() error {
	var m mistakes
	m.to(h.To)
	m.recipients(h)
	m.sub(h.Sub)
	m.section(h.Section, h.Sub)
	m.category(h.Category)
	m.uniqueArgs(h.UniqueArgs)
	m.filters(h.Filters)
	m.times(h)
	m.groups(h)
	m.text(h.BatchID, "batch_id")
	m.text(h.IPPool, "ip_pool")
	return errors.Join(m...)
}

type mistakes []error

func (m *mistakes) add(format string, args ...any) {
	*m = append(*m, fmt.Errorf("smtpapi: "+format, args...))
}

// each reports what wrong says of the entries 0 to n-1 of a list, each text once.
func (m *mistakes) each(list string, n int, wrong func(i int) string) {
	var texts []string // in the order they are found
	first, count := make(map[string]int), make(map[string]int)
	for i := range n {
		text := wrong(i)
		if text == "" {
			continue
		}
		if count[text]++; count[text] == 1 {
			texts = append(texts, text)
			first[text] = i
		}
	}
	for _, text := range texts {
		more := ""
		if n := count[text] - 1; n > 0 {
			more = fmt.Sprintf(" (and %d more)", n)
		}
		m.add("%s[%d]: %s%s", list, first[text], text, more)
	}
}

// text reports what keeps a string, which format and args name, out of the JSON.
func (m *mistakes) text(s, format string, args ...any) {
	if wrong := textMistake(s); wrong != "" {
		m.add("%s: %s", fmt.Sprintf(format, args...), wrong)
	}
}

func textMistake(s string) string {
	switch {
	case !utf8.ValidString(s):
		return "not valid UTF-8"
	case quotedLen(s) > maxString:
		return tooLong
	}
	return ""
}

// quotedLen is the length of s as a JSON string in ASCII. It is exact where that matters: an octet becomes six at most.
func quotedLen(s string) int {
	if n := 6*len(s) + 2; n <= maxString {
		return n
	}
	quoted, _ := marshalASCII(s) // a string has no error
	return len(quoted)
}

func (m *mistakes) to(to []string) {
	if n := len(to); n > maxTo {
		m.add("to: %d addresses, more than 10,000", n)
	}
	m.each("to", len(to), func(i int) string {
		switch s := to[i]; {
		case s == "":
			return "empty"
		case !strings.Contains(s, "@"):
			return "an address without @"
		case strings.ContainsFunc(s, unicode.IsControl):
			return "an address with a control character"
		default:
			return textMistake(s)
		}
	})
}

// recipients checks that everything told for each recipient is told of the same number of them (Substitution Tags,
// Scheduling Parameters). That number is known if to is given; the envelope is not known here.
func (m *mistakes) recipients(h Header) {
	want, of := len(h.To), "to"
	check := func(n int, what string) {
		if want == 0 {
			want, of = n, what
		} else if n != want {
			m.add("%s has %d values and %s %d: want one for each recipient", what, n, of, want)
		}
	}
	for _, tag := range slices.Sorted(maps.Keys(h.Sub)) {
		if what := fmt.Sprintf("sub %q", tag); len(h.Sub[tag]) == 0 {
			m.add("%s has no values: want one for each recipient", what)
		} else {
			check(len(h.Sub[tag]), what)
		}
	}
	if len(h.SendEachAt) > 0 {
		check(len(h.SendEachAt), "send_each_at")
	}
}

func (m *mistakes) sub(sub map[string][]string) {
	tags := slices.Sorted(maps.Keys(sub))
	recipients := 0
	for _, tag := range tags {
		m.tag("sub", tag)
		m.each(fmt.Sprintf("sub %q", tag), len(sub[tag]), func(i int) string { return textMistake(sub[tag][i]) })
		recipients = max(recipients, len(sub[tag]))
	}
	m.each("sub: recipient", recipients, func(i int) string {
		size := 0
		for _, tag := range tags {
			if i < len(sub[tag]) {
				size += len(tag) + len(sub[tag][i])
			}
		}
		if size > maxSubBytes {
			return "more than 50,000 bytes of tags and values for one recipient"
		}
		return ""
	})

	// What a tag's values contain is asked of all recipients at first: mostly nothing, and no recipient needs a look.
	inside := make(map[string][]string)
	for _, tag := range tags {
		for _, other := range tags {
			if other != "" && slices.ContainsFunc(sub[tag], func(value string) bool { return strings.Contains(value, other) }) {
				inside[tag] = append(inside[tag], other)
			}
		}
	}
	if len(inside) == 0 {
		return
	}
	m.each("sub: recipient", recipients, func(i int) string {
		deep := tags // those that begin a chain of so many substitutions in each other
		for range maxNesting + 1 {
			next := []string(nil)
			for _, tag := range tags {
				if i < len(sub[tag]) && slices.ContainsFunc(inside[tag], func(other string) bool {
					return slices.Contains(deep, other) && strings.Contains(sub[tag][i], other)
				}) {
					next = append(next, tag)
				}
			}
			deep = next
		}
		if len(deep) > 0 { // an endless chain too
			return fmt.Sprintf("more than 4 substitutions nested, from tag %q on", deep[0])
		}
		return ""
	})
}

// tag checks a tag of sub or section (Substitution Tags, Section Tags: no spaces).
func (m *mistakes) tag(key, tag string) {
	switch {
	case tag == "":
		m.add("%s: a tag is empty", key)
	case strings.ContainsFunc(tag, unicode.IsSpace):
		m.add("%s %q: white space in the tag", key, tag)
	}
	m.text(tag, "%s: tag %.40q", key, tag)
}

func (m *mistakes) section(section map[string]string, sub map[string][]string) {
	for _, tag := range slices.Sorted(maps.Keys(section)) {
		m.tag("section", tag)
		m.text(section[tag], "section %q", tag)
		used := false
		for _, values := range sub {
			used = used || slices.ContainsFunc(values, func(value string) bool { return strings.Contains(value, tag) })
		}
		if !used {
			m.add("section %q: in no value of sub, so that it is never replaced", tag)
		}
		for _, other := range slices.Sorted(maps.Keys(section)) {
			if other != "" && strings.Contains(section[tag], other) {
				m.add("section %q: contains section %q, which is then not replaced", tag, other)
			}
		}
	}
}

func (m *mistakes) category(category []string) {
	if n := len(category); n > maxCategories {
		m.add("category: %d categories, more than 10", n)
	}
	m.each("category", len(category), func(i int) string {
		switch s := category[i]; {
		case s == "":
			return "empty"
		case strings.ContainsFunc(s, func(r rune) bool { return r > unicode.MaxASCII }):
			return "not US-ASCII"
		default:
			return textMistake(s)
		}
	})
}

func (m *mistakes) uniqueArgs(args map[string]string) {
	size := 0
	for _, name := range slices.Sorted(maps.Keys(args)) {
		size += len(name) + len(args[name])
		m.text(name, "unique_args: name %.40q", name)
		m.text(args[name], "unique_args %.40q", name)
	}
	if size > maxUniqueArgs {
		m.add("unique_args: %d bytes of names and values, more than 10,000", size)
	}
}

func (m *mistakes) filters(f Filters) {
	known := f
	known.Other = nil
	typed := []string{"bypass_list_management", "clicktrack", "dkim", "footer", "ganalytics", "opentrack", "subscriptiontrack",
		"template", "templates"}
	for _, name := range slices.Sorted(maps.Keys(f.Other)) {
		switch {
		case name == "":
			m.add("filters: a name is empty")
		case name == "bcc", name == "spamcheck":
			m.add("filters %q: SendGrid has removed it", name)
		case slices.Contains(typed, name):
			m.add("filters %q: set the field of Filters, not Other", name)
		case name != strings.ToLower(name):
			m.add("filters %.40q: the name is not in lower case", name)
		}
		m.text(name, "filters: name %.40q", name)
		m.settings(name, f.Other[name])
	}
	all := known.settings()
	for _, name := range slices.Sorted(maps.Keys(all)) {
		m.settings(name, all[name].Settings)
	}
	f.checkComplete(m)
}

// settings checks the types and texts of a filter's settings (SMTP Filters).
func (m *mistakes) settings(filter string, settings map[string]any) {
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		if name == "" || name != strings.ToLower(name) {
			m.add("filters %.40q: setting %.40q is empty or not in lower case", filter, name)
		}
		m.text(name, "filters %.40q: setting %.40q", filter, name)
		switch v := settings[name].(type) {
		case string:
			m.text(v, "filters %.40q: %.40q", filter, name)
		case float64:
			if math.IsNaN(v) || math.IsInf(v, 0) {
				m.add("filters %.40q: %.40q is %v, which JSON does not have", filter, name, v)
			}
		case int, int64, bool:
		default:
			m.add("filters %.40q: %.40q is a %T: want string, bool, int, int64 or float64", filter, name, v)
		}
		if v := settings[name]; name == "enable" && !slices.Contains([]any{0, 1, int64(0), int64(1), 0.0, 1.0}, v) {
			m.add("filters %.40q: enable is %.40q: want 0 or 1", filter, fmt.Sprint(v))
		}
	}
}

// checkComplete checks that filters that are enabled say what for: the account's own texts are not used (SMTP Filters).
func (f Filters) checkComplete(m *mistakes) {
	if d := f.DKIM; d != nil && d.Domain == "" && !d.UseFrom {
		m.add("filters dkim: neither domain nor use_from is set")
	}
	if t := f.Footer; t != nil && t.Enable && t.HTML == "" && t.Text == "" {
		m.add("filters footer: enabled without a text")
	}
	if g := f.GAnalytics; g != nil && *g == (GAnalytics{Enable: true}) {
		m.add("filters ganalytics: enabled without a parameter")
	}
	if s := f.SubscriptionTrack; s != nil && *s == (SubscriptionTrack{Enable: true}) {
		m.add("filters subscriptiontrack: enabled without replace or a text")
	}
	if t := f.Templates; t != nil && t.Enable && t.TemplateID == "" {
		m.add("filters templates: enabled without template_id")
	}
	if t := f.Template; t != nil && t.Enable && !strings.Contains(t.HTML, "<% body %>") {
		m.add("filters template: enabled without <%% body %%> in its HTML")
	}
}

func (m *mistakes) times(h Header) {
	if !h.SendAt.IsZero() && len(h.SendEachAt) > 0 {
		m.add("send_at and send_each_at are both set: SendGrid drops such a message")
	}
	latest := time.Now().Add(maxAhead).Unix()
	wrong := func(at time.Time) string {
		switch {
		case at.Unix() <= 0:
			return "not after 1970"
		case at.Unix() > latest:
			return "more than 72 hours ahead"
		}
		return ""
	}
	if !h.SendAt.IsZero() {
		if w := wrong(h.SendAt); w != "" {
			m.add("send_at: %s is %s", h.SendAt.Format(time.RFC3339), w)
		}
	}
	m.each("send_each_at", len(h.SendEachAt), func(i int) string { return wrong(h.SendEachAt[i]) })
}

func (m *mistakes) groups(h Header) {
	if h.ASMGroupID < 0 {
		m.add("asm_group_id: %d is negative", h.ASMGroupID)
	}
	if n := len(h.ASMGroupsToDisplay); n > maxGroupsDisplay {
		m.add("asm_groups_to_display: %d groups, more than 25", n)
	}
	m.each("asm_groups_to_display", len(h.ASMGroupsToDisplay), func(i int) string {
		if h.ASMGroupsToDisplay[i] <= 0 {
			return "not a group's ID"
		}
		return ""
	})
}

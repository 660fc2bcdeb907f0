package smtpapi_test

// The form of the field: ASCII, folded between JSON's tokens, and the same JSON for whoever unfolds it.

import (
	"bytes"
	"encoding/json"
	"net/mail"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/smtprelay/smtprelay/smtpapi"
)

// unfold returns the JSON of a field as a server reads it, in which each fold becomes what unfolded says.
func unfold(t *testing.T, field []byte, unfolded string) string {
	t.Helper()
	value, ok := strings.CutPrefix(string(field), "X-SMTPAPI:")
	value, end := strings.CutSuffix(value, "\r\n")
	if !ok || !end {
		t.Fatalf("not a field with its line end: %q", field)
	}
	return strings.ReplaceAll(value, "\r\n ", unfolded)
}

// checkForm checks what holds for every field, and returns its JSON without white space outside strings.
func checkForm(t *testing.T, field []byte) string {
	t.Helper()
	for line := range bytes.SplitSeq(bytes.TrimSuffix(field, []byte("\r\n")), []byte("\r\n")) {
		if len(line) > 998 {
			t.Errorf("a line of %d octets", len(line))
		}
		if len(bytes.TrimSpace(line)) == 0 {
			t.Error("a line of white space only")
		}
		if i := bytes.IndexFunc(line, func(r rune) bool { return r < ' ' || r > '~' }); i >= 0 {
			t.Errorf("%q in a line", line[i])
		}
		// Only a string, with the comma or colon after it, may make a line longer than 78.
		if text := bytes.TrimRight(line, ",:"); len(line) > 78 && !json.Valid(text) {
			t.Errorf("a line of %d octets that could be folded: %s", len(line), line)
		}
	}
	for i, line := range strings.Split(string(field), "\r\n") {
		if last := i > 0 && line == ""; i > 0 && !last && (len(line) < 2 || line[0] != ' ') {
			t.Errorf("line %d is not a continuation: %q", i, line)
		}
	}
	var first string
	for _, unfolded := range []string{" ", "", "\t", "\r\n ", "   "} {
		var b bytes.Buffer
		if err := json.Compact(&b, []byte(unfold(t, field, unfolded))); err != nil {
			t.Fatalf("folds as %q: %v in %s", unfolded, err, field)
		}
		if first == "" {
			first = b.String()
		} else if first != b.String() {
			t.Errorf("folds as %q: another JSON", unfolded)
		}
	}
	// A mail reader finds this one field and nothing else.
	m, err := mail.ReadMessage(strings.NewReader(string(field) + "\r\n"))
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Header) != 1 || len(m.Header["X-Smtpapi"]) != 1 {
		t.Errorf("fields: %v", m.Header)
	}
	return first
}

func TestMarshalWritesEveryKey(t *testing.T) {
	h := smtpapi.Header{
		To:         []string{"ann@example.org", "bob@example.org"},
		Sub:        map[string][]string{"-name-": {"Ann", "Bob"}, "-s-": {":hello", ":hello"}},
		Section:    map[string]string{":hello": "Hello -name-"},
		Category:   []string{"orders"},
		UniqueArgs: map[string]string{"order": "12345"},
		Filters: smtpapi.Filters{
			BypassListManagement: true,
			ClickTrack:           &smtpapi.ClickTrack{Enable: true, EnableText: true},
			DKIM:                 &smtpapi.DKIM{Domain: "example.com"},
			Footer:               &smtpapi.Footer{Enable: true, HTML: "<p>Bye & thanks", Text: "Bye"},
			GAnalytics: &smtpapi.GAnalytics{Enable: true, Source: "s", Medium: "m", Term: "t", Content: "c",
				Campaign: "n"},
			OpenTrack:         &smtpapi.OpenTrack{Enable: true, Replace: "%open%"},
			SubscriptionTrack: &smtpapi.SubscriptionTrack{Enable: true, HTML: "<% here %>", Text: "<% %>", Replace: "[u]"},
			Templates:         &smtpapi.Templates{Enable: true, TemplateID: "5997"},
			Template:          &smtpapi.Template{},
			Other:             map[string]map[string]any{"new": {"enable": 1, "score": 3.5}, "old": nil},
		},
		SendEachAt:         []time.Time{time.Unix(1409348513, 999), time.Unix(1409348514, 0)},
		BatchID:            "MWQx",
		ASMGroupID:         1,
		ASMGroupsToDisplay: []int{1, 2},
		IPPool:             "pool",
	}
	field, err := h.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	want := `{"to":["ann@example.org","bob@example.org"],"sub":{"-name-":["Ann","Bob"],"-s-":[":hello",":hello"]},` +
		`"section":{":hello":"Hello -name-"},"category":["orders"],"unique_args":{"order":"12345"},"filters":{` +
		`"bypass_list_management":{"settings":{"enable":1}},"clicktrack":{"settings":{"enable":1,"enable_text":true}},` +
		`"dkim":{"settings":{"domain":"example.com","use_from":0}},` +
		`"footer":{"settings":{"enable":1,"text/html":"<p>Bye & thanks","text/plain":"Bye"}},` +
		`"ganalytics":{"settings":{"enable":1,"utm_campaign":"n","utm_content":"c","utm_medium":"m","utm_source":"s","utm_term":"t"}},` +
		`"new":{"settings":{"enable":1,"score":3.5}},"old":{"settings":{}},"opentrack":{"settings":{"enable":1,"replace":"%open%"}},` +
		`"subscriptiontrack":{"settings":{"enable":1,"replace":"[u]","text/html":"<% here %>","text/plain":"<% %>"}},` +
		`"template":{"settings":{"enable":0}},"templates":{"settings":{"enable":1,"template_id":"5997"}}},` +
		`"send_each_at":[1409348513,1409348514],"batch_id":"MWQx","asm_group_id":1,"asm_groups_to_display":[1,2],"ip_pool":"pool"}`
	if got := checkForm(t, field); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if got, _ := (smtpapi.Header{SendAt: time.Unix(1409348513, 5)}).Marshal(); string(got) != "X-SMTPAPI: {\"send_at\":1409348513}\r\n" {
		t.Errorf("send_at: %q", got)
	}
	if got, _ := (smtpapi.Header{}).Marshal(); string(got) != "X-SMTPAPI: {}\r\n" {
		t.Errorf("zero Header: %q", got)
	}
}

func TestMarshalEscapesWhatIsNotPrintableASCII(t *testing.T) {
	for s, want := range map[string]string{
		"á":             `"\u00e1"`,
		"😀":             `"\ud83d\ude00"`,
		"\U0010ffff":    `"\udbff\udfff"`,
		"\uffff\ufffd":  `"\uffff\ufffd"`,
		"\x7f\u0080":    `"\u007f\u0080"`,
		"\u2028":        `"\u2028"`,
		"a\r\nBcc: b@x": `"a\r\nBcc: b@x"`,
		"\x00":          `"\u0000"`,
		`"},{"\`:        `"\"},{\"\\"`,
	} {
		field, err := smtpapi.Header{BatchID: s}.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if got := string(field); got != `X-SMTPAPI: {"batch_id":`+want+"}\r\n" {
			t.Errorf("%q: got %q, want %s", s, got, want)
		}
	}
}

func TestMarshalWritesTheLongestStringOnALineOfItsOwn(t *testing.T) {
	long := strings.Repeat("x", 994) // 996 with its quotes
	h := smtpapi.Header{UniqueArgs: map[string]string{long: long, long[1:]: long}}
	field, err := h.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	checkForm(t, field)
	longest := 0
	for line := range strings.SplitSeq(string(field), "\r\n") {
		longest = max(longest, len(line))
	}
	if longest != 998 {
		t.Errorf("the longest line has %d octets, want 998", longest)
	}
}

// FuzzMarshal puts any texts wherever a header takes text. What Check lets through must be read back as it was.
func FuzzMarshal(f *testing.F) {
	f.Add("ann@example.org", "-name-", "Ann", "order", "12345", 3.5, int64(1409348513))
	f.Add("a@x\r\nBcc: b@x", "a b", "\r\n.\r\n", "é😀\x7f\u2028", `"},{"\\"`, 1e300, int64(1))
	f.Add("@", "{", "}", "[", strings.Repeat(`\"é`, 110), 0.0, int64(-1))
	f.Add("@", "\xff", "\xc0\x80", "\xed\xa0\x80", strings.Repeat("x", 995), 1.0, int64(1))
	f.Add("@", strings.Repeat(`\`, 497), ": ", ",", strings.Repeat("\n", 497), -1e-9, int64(1<<40))
	f.Fuzz(func(t *testing.T, to, tag, value, name, text string, number float64, at int64) {
		h := smtpapi.Header{
			To:         []string{to, to},
			Sub:        map[string][]string{tag: {value, text}},
			Category:   []string{name},
			UniqueArgs: map[string]string{name: value, tag: text},
			Filters: smtpapi.Filters{
				Footer: &smtpapi.Footer{HTML: text, Text: value},
				Other:  map[string]map[string]any{"new": {name: text, "number": number}},
			},
			SendAt:     time.Unix(at, 0),
			BatchID:    text,
			IPPool:     value,
			ASMGroupID: int(at),
		}
		// Without a part that is wrong, the others are tried.
		for _, mend := range []func(){
			func() {},
			func() { h.SendAt, h.ASMGroupID, h.To = time.Time{}, 1, nil },
			func() { h.Sub, h.Category = nil, nil },
			func() { h.Filters.Other = map[string]map[string]any{"new": {"text": text, "value": value}} },
			func() { h.UniqueArgs, h.Filters.Footer = map[string]string{"a": text, "b": value}, nil },
			func() { h.Filters.Other, h.UniqueArgs, h.IPPool = nil, nil, "" },
			func() { h.BatchID, h.IPPool = "", value },
		} {
			mend()
			field, err := h.Marshal()
			if (err == nil) != (h.Check() == nil) {
				t.Errorf("Marshal: %v, Check: %v", err, h.Check())
			}
			if err != nil {
				continue
			}
			var got map[string]any
			if err := json.Unmarshal([]byte(checkForm(t, field)), &got); err != nil {
				t.Fatal(err)
			}
			if want := expected(h); !reflect.DeepEqual(got, want) {
				t.Errorf("got  %q\nwant %q", got, want)
			}
			again, err := h.AppendTo([]byte("Subject: x\r\n"))
			if err != nil || string(again) != "Subject: x\r\n"+string(field) {
				t.Errorf("AppendTo: %q, %v", again, err)
			}
		}
	})
}

// expected is the JSON of h as encoding/json reads it, written by hand for the fields that the fuzz test uses.
func expected(h smtpapi.Header) map[string]any {
	m := make(map[string]any)
	list := func(texts []string) (l []any) {
		for _, s := range texts {
			l = append(l, s)
		}
		return l
	}
	if h.To != nil {
		m["to"] = list(h.To)
	}
	if h.Category != nil {
		m["category"] = list(h.Category)
	}
	for tag, values := range h.Sub {
		m["sub"] = map[string]any{tag: list(values)}
	}
	if h.UniqueArgs != nil {
		args := make(map[string]any)
		for name, s := range h.UniqueArgs {
			args[name] = s
		}
		m["unique_args"] = args
	}
	filters := make(map[string]any)
	if t := h.Filters.Footer; t != nil {
		s := map[string]any{"enable": 0.0}
		if t.HTML != "" {
			s["text/html"] = t.HTML
		}
		if t.Text != "" {
			s["text/plain"] = t.Text
		}
		filters["footer"] = map[string]any{"settings": s}
	}
	for name, settings := range h.Filters.Other {
		filters[name] = map[string]any{"settings": settings}
	}
	if len(filters) > 0 {
		m["filters"] = filters
	}
	if !h.SendAt.IsZero() {
		m["send_at"] = float64(h.SendAt.Unix())
	}
	if h.BatchID != "" {
		m["batch_id"] = h.BatchID
	}
	if h.IPPool != "" {
		m["ip_pool"] = h.IPPool
	}
	if h.ASMGroupID != 0 {
		m["asm_group_id"] = float64(h.ASMGroupID)
	}
	return m
}

package smtpapi

// Filters changes settings of the account for one message. A nil filter leaves the account's setting as it is. A filter that is set
// replaces it: with Enable false the filter is off; with Enable true none of the account's settings for it are used, so set all of
// them here (SMTP Filters).
type Filters struct {
	// BypassListManagement sends the message even to recipients who have unsubscribed, bounced or complained. It is for
	// messages such as password resets.
	BypassListManagement bool

	ClickTrack        *ClickTrack
	DKIM              *DKIM
	Footer            *Footer
	GAnalytics        *GAnalytics
	OpenTrack         *OpenTrack
	SubscriptionTrack *SubscriptionTrack
	Templates         *Templates
	Template          *Template

	// Other holds the settings of filters that have no field here, by the filter's name: strings, booleans, and numbers of
	// the types int, int64 and float64. All names are in lower case and "enable" is 0 or 1. The filters bcc and spamcheck,
	// which SendGrid has removed, are an error.
	Other map[string]map[string]any
}

// ClickTrack makes links lead through SendGrid, which counts the clicks.
type ClickTrack struct {
	Enable     bool
	EnableText bool // in the plain text too
}

// DKIM is the domain to sign for, which should be that of the From field. One of the two fields is needed.
type DKIM struct {
	Domain  string
	UseFrom bool // the domain of the From field
}

// Footer is put at the end of the message. If it is enabled, one of the texts is needed.
type Footer struct {
	Enable bool
	HTML   string // "text/html"
	Text   string // "text/plain"
}

// GAnalytics adds the parameters of Google Analytics to links. If it is enabled, one of them is needed.
type GAnalytics struct {
	Enable   bool
	Source   string // "utm_source"
	Medium   string // "utm_medium"
	Term     string // "utm_term"
	Content  string // "utm_content"
	Campaign string // "utm_campaign"
}

// OpenTrack puts an image into the HTML that tells when the message is opened.
type OpenTrack struct {
	Enable  bool
	Replace string // what the image replaces; empty means that it is put at the end
}

// SubscriptionTrack puts a link for unsubscribing into the message. If it is enabled, Replace or one of the texts is needed.
type SubscriptionTrack struct {
	Enable  bool
	HTML    string // "text/html": appended; <% text %> becomes the link
	Text    string // "text/plain": appended; <% %> becomes the link
	Replace string // what the link's URL replaces; used instead of the texts
}

// Templates sends the message through a transactional template.
type Templates struct {
	Enable     bool
	TemplateID string // needed if it is enabled
}

// Template is SendGrid's old filter, which wraps the HTML of the message. [Templates] has taken its place.
type Template struct {
	Enable bool
	HTML   string // "text/html": contains <% body %> if it is enabled
}

// filterSettings is a filter as it stands in the JSON.
type filterSettings struct {
	Settings map[string]any `json:"settings"`
}

// settings returns all filters by their names.
func (f Filters) settings() map[string]filterSettings {
	all := make(map[string]filterSettings)
	for name, s := range f.Other {
		all[name] = filterSettings{s}
		if s == nil {
			all[name] = filterSettings{map[string]any{}}
		}
	}
	if f.BypassListManagement {
		all["bypass_list_management"] = texts("enable", true)
	}
	if c := f.ClickTrack; c != nil {
		all["clicktrack"] = texts("enable", c.Enable)
		all["clicktrack"].Settings["enable_text"] = c.EnableText
	}
	if d := f.DKIM; d != nil {
		all["dkim"] = texts("use_from", d.UseFrom, "domain", d.Domain)
	}
	if t := f.Footer; t != nil {
		all["footer"] = texts("enable", t.Enable, "text/html", t.HTML, "text/plain", t.Text)
	}
	if g := f.GAnalytics; g != nil {
		all["ganalytics"] = texts("enable", g.Enable, "utm_source", g.Source, "utm_medium", g.Medium,
			"utm_term", g.Term, "utm_content", g.Content, "utm_campaign", g.Campaign)
	}
	if o := f.OpenTrack; o != nil {
		all["opentrack"] = texts("enable", o.Enable, "replace", o.Replace)
	}
	if s := f.SubscriptionTrack; s != nil {
		all["subscriptiontrack"] = texts("enable", s.Enable, "text/html", s.HTML, "text/plain", s.Text, "replace", s.Replace)
	}
	if t := f.Templates; t != nil {
		all["templates"] = texts("enable", t.Enable, "template_id", t.TemplateID)
	}
	if t := f.Template; t != nil {
		all["template"] = texts("enable", t.Enable, "text/html", t.HTML)
	}
	return all
}

// texts returns the settings of a filter: a switch, which is 0 or 1, and pairs of a name and a text that may be empty.
func texts(name string, on bool, pairs ...string) filterSettings {
	s := map[string]any{name: 0}
	if on {
		s[name] = 1
	}
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			s[pairs[i]] = pairs[i+1]
		}
	}
	return filterSettings{s}
}
